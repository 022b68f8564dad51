# /// script
# dependencies = ["rectools[torch]==0.19.0"]
# ///
"""RecTools' SASRec for a task of collab_sequence.py: reads rows.npz of a folder, writes lists.npy into it.

Sizes, epochs and users in a batch come from the task, the same as ours; the learning rate is RecTools' own.
"""
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

def main(folder, seed, epochs, users, n_factors, max_len, dropout):
    torch.set_num_threads(1)
    rows = np.load(Path(folder)/'rows.npz')
    # time is the place of a row in the order of all, since RecTools breaks ties in another way
    df = pd.DataFrame({Columns.User: rows['users'], Columns.Item: rows['items'], Columns.Weight: 1.,
                       Columns.Datetime: pd.to_datetime(np.arange(len(rows['users'])), unit='s')})
    seed_everything(int(seed), verbose=False)
    model = SASRecModel(n_blocks=2, n_heads=2, n_factors=int(n_factors), dropout_rate=float(dropout), loss='softmax',
                        session_max_len=int(max_len), epochs=int(epochs), batch_size=int(users), deterministic=True,
                        recommend_torch_device='cpu')
    dataset = Dataset.construct(df)
    model.fit(dataset)
    asked = rows['asked']
    lists = model.recommend(users=asked, dataset=dataset, k=10, filter_viewed=True, on_unsupported_targets='ignore')
    res = np.zeros((len(asked), 10), dtype=np.int64)
    place = {user: i for i,user in enumerate(asked.tolist())}
    res[lists[Columns.User].map(place), lists[Columns.Rank] - 1] = lists[Columns.Item]
    np.save(Path(folder)/'lists.npy', res)

if __name__ == '__main__': main(*sys.argv[1:])
