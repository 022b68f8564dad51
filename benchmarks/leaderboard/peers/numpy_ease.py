# /// script
# dependencies = ["numpy==2.4.6", "scipy==1.17.1"]
# ///
"EASE (Steck 2019) in a few lines of numpy, on ratings or counts as they are and on ones"
import common
import numpy as np

def ease(rows, reg, values):
    x = rows.matrix(values)
    gram = (x.T @ x).toarray()
    gram[np.diag_indices_from(gram)] += reg
    inverse = np.linalg.inv(gram)
    weights = inverse/-np.diag(inverse)
    np.fill_diagonal(weights, 0)
    return lambda users: x[users] @ weights

grid = dict(reg=[30, 100, 300, 1000, 3000, 10_000], values=['ones', 'given', 'above'])
if __name__ == '__main__': common.main(['numpy'], lists={'EASE (numpy)': (ease, grid)})
