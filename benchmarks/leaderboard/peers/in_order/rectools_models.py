# /// script
# dependencies = ["rectools[torch]==0.19.0"]
# ///
"RecTools: SASRec, with the softmax of all items"
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

def trainer(epochs):
    return Trainer(max_epochs=epochs, accelerator='cpu', devices=1, deterministic=True, logger=False,
                   enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False)

def sasrec(rows, users, seed, dropout, batch, epochs=20):
    "Lists of `users` by a model of `rows`, which are in order"
    torch.set_num_threads(1)
    seed_everything(seed, verbose=False)
    # times are places in the order of all rows: where several have one time, packages order them differently
    when = pd.to_datetime(np.arange(len(rows.users)), unit='s')
    df = pd.DataFrame({Columns.User: rows.users, Columns.Item: rows.items, Columns.Weight: 1., Columns.Datetime: when})
    model = SASRecModel(n_blocks=2, n_heads=2, n_factors=64, session_max_len=200, loss='softmax', dropout_rate=dropout,
                        batch_size=batch, get_trainer_func=lambda: trainer(epochs), recommend_torch_device='cpu')
    dataset = Dataset.construct(df)
    model.fit(dataset)
    found = model.recommend(users=users, dataset=dataset, k=common.K, filter_viewed=True,
                            on_unsupported_targets='ignore')
    lists = np.full((len(users), common.K), -1)
    lists[np.searchsorted(users, found[Columns.User]), found[Columns.Rank] - 1] = found[Columns.Item]
    return lists

if __name__ == '__main__':
    warnings.filterwarnings('ignore')
    models = {'SASRec (RecTools)': (sasrec, dict(dropout=[.2, .4], batch=[32, 128]))}
    common.main(['rectools', 'torch'], in_order=models)
