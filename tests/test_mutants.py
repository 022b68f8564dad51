"Exported functions of every floor are broken, one at a time in a copied checkout: each is caught by its notebook"
import ast
import json

import pytest
import rules
from checkouts import in_checkout, succeeds

pytestmark = pytest.mark.slow

# Room, what is defined there, how a line of it reads, and how it reads when it is broken
MUTANTS = [
    ('paddy_multi/core', 'first_few', 'values[:n]', 'values[:n+1]'),
    ('paddy_multi/kinds', 'OrdinalTarget', 'above[:,0] = 1', 'above[:,0] = 0'),
    ('paddy_multi/kinds', 'item_deviances', '- targs + preds', '+ targs - preds'),
    ('paddy_multi/targets', 'parts', 'counts.sum(0)', 'counts.mean(0)'),
    ('paddy_multi/data', 'lean_of', '-np.degrees', 'np.degrees'),
    ('paddy_multi/accumulate', 'label_count', '(weights*valid).sum()', 'weights.sum()'),
    ('paddy_multi/use', 'shares_of', 'weight/sum(weights)', 'weight'),
    ('collab_deep/models', 'into_range', '*(high-low) + low', '*(high-low) - low'),
    ('collab_deep/data', 'TimeSplitter', 'return order[:cut], order[cut:]', 'return order[cut:], order[:cut]'),
    ('collab_deep/lists', 'top_k', '(scores >= values[:,-1:])', '(scores > values[:,-1:])'),
    ('collab_deep/lists', 'ranking_metrics', 'torch.log2(place + 1)', 'torch.log2(place + 2)'),
    ('collab_deep/lists', 'fold_row', 'decay*((row-start)**2)', '((row-start)**2)'),
    ('collab_deep/train', 'bpr_loss', 'taken - left', 'left - taken'),
    ('collab_deep/use', 'cosines', 'normalize(factors) @', 'factors @')]


def defines(source, name):
    kinds = ast.FunctionDef, ast.ClassDef
    return rules.exports(source) and any(isinstance(o, kinds) and o.name == name for o in ast.parse(source).body)


def cell_that_defines(room, name):
    "The notebook of the folder `room` that exports `name`, and the number of its cell"
    cells = [(path, i) for path in sorted(room.glob('*.ipynb'))
             for i, o in enumerate(json.loads(path.read_text(encoding='utf-8'))['cells'])
             if o['cell_type'] == 'code' and defines(''.join(o['source']), name)]
    assert len(cells) == 1, f'{name} is defined in {cells}'
    return cells[0]


def break_cell(path, i, old, new):
    nb = json.loads(path.read_text(encoding='utf-8'))
    source = ''.join(nb['cells'][i]['source'])
    n = source.count(old)
    assert n == 1, f'{old!r} stands {n} times in cell {i} of {path.name}: choose another line'
    nb['cells'][i]['source'] = source.replace(old, new).splitlines(True)
    path.write_text(json.dumps(nb), encoding='utf-8')


IDS = [f'{room.replace("/", ".")}.{name}' for room, name, *_ in MUTANTS]


@pytest.mark.parametrize('room, name, old, new', MUTANTS, ids=IDS)
def test_a_broken_function_is_caught_by_its_notebook(checkout, room, name, old, new):
    path, i = cell_that_defines(checkout/'nbs'/room, name)
    module = checkout/room/f'{path.stem.partition("_")[2]}.py'
    before = module.read_text(encoding='utf-8')
    succeeds(in_checkout(path.parent, 'nbdev-test', path))
    break_cell(path, i, old, new)
    succeeds(in_checkout(path.parent, 'nbdev-export', '--path', path))
    assert module.read_text(encoding='utf-8') != before
    done = in_checkout(path.parent, 'nbdev-test', path)
    assert done.returncode == 1 and path.name in done.stderr, f'{name} is broken, and {path.name} passes'
    assert not {'SyntaxError', 'NameError', 'TypeError'} & set(done.stderr.replace(':', ' ').split())
