"""A two-tower recommender of TorchRec on MovieLens-100k, its tables cut by row over the processes of torchrun (gloo).

It needs an environment of its own: `fbgemm-gpu`, which `torchrec` asks for, cannot be imported without a driver, so
`fbgemm-gpu-cpu` takes its place:

    python -m venv build/torchrec && . build/torchrec/bin/activate
    pip install torch==2.14.1 numpy pandas tensordict torchmetrics==1.0.3 pyre-extensions tqdm
    pip install --no-deps torchrec==1.9.2 fbgemm-gpu-cpu==1.9.0 recbole==1.2.1
    OMP_NUM_THREADS=1 PYTHONPATH=. python -m torch.distributed.run --standalone --nproc-per-node 2 \\
        benchmarks/torchrec/two_processes.py --out benchmarks/torchrec

Towers and dot product are trained data-parallel; the tables have an optimizer fused into their backward pass, which
updates the rows that a batch has used.
"""
import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchrec
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from collab_deep.data.movielens import movielens_100k

DIM, BS, EPOCHS = 32, 1024, 8
FEATURES = 'user', 'item', 'genre'


# --- data -----------------------------------------------------------------------------------------------------------
def ratings():
    "Numbers of users, items and each item's genres, ratings, and which are held out: a random fifth"
    df, films = movielens_100k(), movielens_100k('items')
    genres = sorted({g for o in films.genres for g in o.split('|')})
    of_film = dict(zip(films.item, ([genres.index(g) for g in o.split('|')] for o in films.genres)))
    users, items = df.user.astype('category'), df.item.astype('category')
    bags = [torch.tensor(of_film[o]) for o in items.cat.categories]
    data = [torch.tensor(np.array(o)) for o in (users.cat.codes.astype(int), items.cat.codes.astype(int),
                                                df.rating.astype('float32'))]
    held_out = torch.rand(len(df), generator=torch.Generator().manual_seed(42)) < .2
    return data, bags, held_out, dict(user=len(users.cat.categories), item=len(bags), genre=len(genres))


def features(users, items, bags):
    "A batch as TorchRec takes it: one user, one item and one or more genres each"
    own = [bags[i] for i in items.tolist()]
    one = torch.ones(len(users), dtype=torch.int32)
    lengths = torch.cat([one, one, torch.tensor([len(o) for o in own], dtype=torch.int32)])
    return KeyedJaggedTensor(keys=[*FEATURES], values=torch.cat([users, items, *own]), lengths=lengths)


# --- model ----------------------------------------------------------------------------------------------------------
class TwoTowers(nn.Module):
    "Users and items meet in a dot product"
    def __init__(self, rows):
        super().__init__()
        tables = [EmbeddingBagConfig(name=o, embedding_dim=DIM, num_embeddings=n, feature_names=[o],
                                     init_fn=lambda t: nn.init.normal_(t, std=.1)) for o, n in rows.items()]
        self.tables = EmbeddingBagCollection(tables=tables, device=torch.device('meta'))
        self.user = nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(), nn.Linear(DIM, DIM+1))
        self.item = nn.Sequential(nn.Linear(2*DIM, DIM), nn.ReLU(), nn.Linear(DIM, DIM+1))
        self.mean = nn.Parameter(torch.tensor(3.5))

    def forward(self, batch):
        o = self.tables(batch)
        u, i = self.user(o['user']), self.item(torch.cat([o['item'], o['genre']], 1))
        return (u[:, :DIM]*i[:, :DIM]).sum(1) + u[:, DIM] + i[:, DIM] + self.mean


def spread(model):
    "Tables cut by row, the rest data-parallel"
    apply_optimizer_in_backward(RowWiseAdagrad, model.tables.parameters(), dict(lr=.03))
    sharder = EmbeddingBagCollectionSharder()
    by_row = construct_module_sharding_plan(model.tables, {o: row_wise() for o in FEATURES}, sharder,
                                            world_size=dist.get_world_size(), device_type='cpu')
    plan = ShardingPlan(dict(tables=by_row))  # as the planner offers rows on GPUs only
    return DistributedModelParallel(model, env=ShardingEnv.from_process_group(dist.GroupMember.WORLD),
                                    device=torch.device('cpu'), plan=plan, sharders=[sharder])


# --- training -------------------------------------------------------------------------------------------------------
def own_part(idxs, rank, n):
    "Each process's share of a batch"
    return idxs.tensor_split(n)[rank]


def epoch(model, opt, data, bags, idxs, rank, n):
    for batch in idxs[torch.randperm(len(idxs))].split(BS):
        users, items, stars = (o[own_part(batch, rank, n)] for o in data)
        loss = (model(features(users, items, bags))-stars).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()


@torch.no_grad()
def error(model, data, bags, idxs, rank, n):
    "Mean squared error over the held-out ratings of all processes"
    total = torch.zeros(2, dtype=torch.float64)
    for batch in idxs.split(4*BS):
        users, items, stars = (o[own_part(batch, rank, n)] for o in data)
        off = (model(features(users, items, bags)).clamp(1, 5)-stars).square().double()
        total += torch.tensor([off.sum(), len(off)])
    dist.all_reduce(total)
    return float(total[0]/total[1])


def table_rows(model):
    "Rows of each table that this process holds"
    state = model.module.tables.state_dict()
    return {k.split('.')[1]: sum(o.tensor.shape[0] for o in v.local_shards()) for k, v in state.items()}


def about():
    cpu = next(o.split(':')[1].strip() for o in open('/proc/cpuinfo') if o.startswith('model name'))
    return dict(cpu=cpu, cores=len(os.sched_getaffinity(0)), python=platform.python_version(),
                torch=torch.__version__.split('+')[0], torchrec=torchrec.__version__,
                date=time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime()))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, help='folder for the JSON')
    p.add_argument('--epochs', type=int, default=EPOCHS)
    args = p.parse_args()
    dist.init_process_group('gloo')
    rank, n = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)  # other rows, other numbers; what is not in tables is sent by process 0
    data, bags, held_out, rows = ratings()
    train, valid = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
    model = spread(TwoTowers(rows))
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    opt = KeyedOptimizerWrapper(dense, lambda ps: torch.optim.Adam(ps, lr=3e-3))
    of_all = [None]*n
    dist.all_gather_object(of_all, table_rows(model))
    mean = data[2][train].mean()
    found = dict(about=about(), processes=n, rows=rows, rows_of_each=of_all, bs=BS, dim=DIM,
                 mse_of_the_mean=round(float((data[2][valid]-mean).square().mean()), 4), epochs=[])
    for i in range(args.epochs):
        torch.manual_seed(i)  # the same order in all processes
        start = time.perf_counter()
        epoch(model, opt, data, bags, train, rank, n)
        seconds = time.perf_counter()-start
        found['epochs'].append(dict(valid_mse=round(error(model, data, bags, valid, rank, n), 4),
                                    seconds=round(seconds, 2)))
        if rank == 0: print(i, found['epochs'][-1], flush=True)
    if rank == 0:
        print({k: v for k, v in found.items() if k != 'epochs'})
        if args.out: (args.out/f'processes_{n}.json').write_text(json.dumps(found, indent=1)+'\n')
    dist.destroy_process_group()


if __name__ == '__main__': main()
