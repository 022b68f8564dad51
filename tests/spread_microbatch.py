"Learners that run their rows a few at a time in several processes, beside one process with whole batches"
import warnings
from functools import partial

import torch
import torch.nn.functional as F
from fastai.basics import Adam, Callback
from fastai.callback.training import GradientClip
from fastai.metrics import F1Score, accuracy
from torch import nn

from paddy_multi.accumulate.microbatch import MicroBatch
from paddy_multi.distributed.across import across_processes
from paddy_multi.distributed.ranks import join_processes
from spread import (DrawnMixUp, MixedCrossEntropy, alone, compare, cross_entropy, learner, missing, mlp, numbers_of,
                    one_hot, pairs, quietly, table_learner, weights)


# --- models and losses ----------------------------------------------------------------------------------------------
class SmallCard(nn.Sequential):
    "Runs out of memory with more than 2 rows in the processes of `where`, in all passes or in those with gradients"
    where, always = (), True
    def forward(self, x):
        out = super().forward(x)
        if self.training and len(x) > 2 and join_processes().rank in self.where:
            if self.always or torch.is_grad_enabled(): raise torch.OutOfMemoryError('CUDA out of memory')
        return out


def small_card(where=()):
    model = SmallCard(*mlp())
    model.where = where
    return model


def small_card_under_head(where=(), always=True):
    body, head = mlp()
    body = SmallCard(*body)
    body.where, body.always = where, always
    return nn.Sequential(body, head)


def norm_in_head():
    torch.manual_seed(1)
    head = nn.Sequential(nn.BatchNorm1d(32), nn.Dropout(.3), nn.Linear(32, 5))
    return nn.Sequential(nn.Sequential(nn.Linear(20, 32), nn.Tanh()), head).double()


class Centred(nn.Module):
    "Takes the mean of the batch away"
    def forward(self, x): return x - x.mean(0)


class MeanSquare:
    "A mean over items that is not known to be one"
    def __call__(self, preds, targs): return F.mse_loss(preds, targs)


class ByParts:
    "Says its parts, but not what labels count before there is an output"
    def __call__(self, preds, targs):
        sums, counts = self.parts(preds, targs)
        return (sums/counts.clamp(min=1)).sum()

    def parts(self, preds, targs):
        counts = (targs != -100).sum()[None].to(preds.dtype)
        return F.cross_entropy(preds, targs, reduction='sum')[None], counts


def masked(preds, targs):
    "A mean over the numbers that are there"
    there = ~targs.isnan()
    return ((preds-targs)[there]**2).mean()


# --- the same updates -----------------------------------------------------------------------------------------------
def label_smoothing(): return nn.CrossEntropyLoss(weight=weights, label_smoothing=.1)
def mse(): return F.mse_loss
def pair_loss(): return pairs
def macro_f1(): return [accuracy, F1Score(average='macro')]
def both(where): return dict(model=partial(small_card, where=where))


# What each case changes; `mixed` is DrawnMixUp, and `bs` that of MicroBatch
CASES = dict(
    plain=dict(), of_one=dict(bs=1, n=33), more_than_a_share=dict(bs=20), ragged=dict(bs=4, n=83),
    one_item_last=dict(n=33), chunks_of_other_numbers=dict(bs=4, n=57), missing=dict(y=missing),
    adam_weights_clip=dict(y=missing, loss=label_smoothing, opt=Adam, cbs=lambda: [GradientClip(.1)]),
    metrics=dict(metrics=macro_f1), kept=dict(keep=True), kept_by_one_item=dict(keep=True, n=33),
    training_metrics=dict(n=33, train_metrics=True, metrics=lambda: [accuracy]),
    unknown_loss=dict(n=33, loss=MeanSquare, y=one_hot), parts=dict(loss=ByParts, y=missing),
    mixup=dict(loss=MixedCrossEntropy, mixed=dict()), cutmix=dict(loss=MixedCrossEntropy, mixed=dict(cut=True)),
    mixup_numbers=dict(loss=mse, y=one_hot, mixed=dict()), not_in_validation=dict(valid=False),
    whole_head=dict(whole_head=True, model=norm_in_head, n=85),
    whole_head_of_few=dict(bs=20, whole_head=True, model=norm_in_head, n=37),
    whole_head_pairs=dict(whole_head=True, loss=pair_loss, n=33),
    whole_head_mixup=dict(whole_head=True, loss=MixedCrossEntropy, mixed=dict()),
    memory_of_the_second=dict(bs=8, auto=True, y=missing, **both((1,))),
    memory_of_the_first=dict(bs=8, auto=True, n=33, **both((0,))),
    memory_of_a_body=dict(bs=8, auto=True, whole_head=True, model=partial(small_card_under_head, where=(1,))),
    memory_of_a_backward_pass=dict(bs=8, auto=True, whole_head=True,
                                   model=partial(small_card_under_head, where=(1,), always=False)),
    enough_memory=dict(bs=8, auto=True))
IN_CHUNKS = 'plain missing cutmix'.split()  # one process runs chunks as well


def fit(learn, epochs):
    torch.manual_seed(7)  # of dropout in a head
    learn.fit_one_cycle(epochs, .05)


def run_case(n=81, loss=cross_entropy, mixed=None, metrics=lambda: [], cbs=lambda: [], model=mlp, train_metrics=False,
             chunked=False, bs=3, y=None, opt=None, **options):
    "Train one case in all processes, `bs` rows at a time, and in one with whole batches, or `chunked` too"
    ranks, made = join_processes(60), []
    more = dict(opt=opt) if opt else {}
    for size, drawn, cut in ((8, [ranks.rank], True), (8*ranks.world_size, range(ranks.world_size), chunked)):
        extra = [DrawnMixUp(drawn, **mixed)] if mixed is not None else []
        if cut: extra.append(MicroBatch(bs, **options))
        build = model if cut or not isinstance(model, partial) else model.func
        made.append(learner(size, loss, n, y, build, [*cbs(), *extra], metrics=metrics(), **more))
        made[-1].recorder.train_metrics = train_metrics
    updates = -(-n//(8*ranks.world_size))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        found = compare(*made, partial(fit, epochs=-(-21//updates)))
    return dict(found, bs=made[0].micro_batch.bs, said=[str(o.message) for o in said if 'ran out' in str(o.message)])


def run_table(weighting):
    "Declared targets"
    n = join_processes(60).world_size
    ours, one = table_learner(8, weighting), table_learner(8*n, weighting)
    ours.add_cb(MicroBatch(3))
    return compare(ours, one, partial(fit, epochs=7))


TABLES = dict(declared='fixed', learned_weights='uncertainty')


# --- what is refused ------------------------------------------------------------------------------------------------
def late_numbers(y):
    "Numbers, of which the odd ones are not there"
    y = y.double()[:, None].repeat(1, 5)
    y[1::2] = torch.nan
    return y


REFUSED = dict(
    pairs=dict(loss=pair_loss), seen_by_one=dict(loss=pair_loss, n=3), seen_by_none=dict(loss=pair_loss, n=2),
    of_few_labels=dict(loss=lambda: masked, y=late_numbers), other_sizes=dict(bs=[3, 4]))


def run_refused(loss=cross_entropy, n=81, y=None, bs=3):
    "What a process says, and whether its weights have moved"
    ranks = join_processes(60)
    learn = learner(8, loss, n, y, cbs=[MicroBatch(bs[ranks.rank] if isinstance(bs, list) else bs)])
    before = numbers_of(learn.model)
    try:
        with across_processes(learn) as l: quietly(l, partial(fit, epochs=1))
    except Exception as e: said = f'{type(e).__name__}: {e}'
    return said, bool((numbers_of(learn.model) != before).any())


# --- predictions ----------------------------------------------------------------------------------------------------
def centred(): return nn.Sequential(*mlp(), Centred())


def predictions(learn):
    return learn.validate(), learn.get_preds(with_input=True, with_loss=True), learn.validate(ds_idx=0)


def run_predictions():
    "Of learners with metrics, without, and whose layers mix rows: in all processes, and in one"
    res = []
    for metrics in [], [accuracy]:
        ours, one = (learner(bs, cross_entropy, 33, metrics=metrics, cbs=cbs)
                     for bs, cbs in ((8, [MicroBatch(3)]), (16, [])))
        with alone(): expected = quietly(one, predictions)
        with across_processes(ours) as l: res.append((quietly(l, predictions), expected))
    learn = learner(8, cross_entropy, 33, model=centred, cbs=[MicroBatch(4)])
    with across_processes(learn) as l: mixing = quietly(l, lambda l: l.validate())
    return res, mixing


def run_all(names):
    "What is found, by name of the case"
    found = {name: run_table(TABLES[name]) if name in TABLES else run_case(**CASES[name]) for name in names}
    return found | {f'{name}_in_chunks': run_case(**CASES[name], chunked=True) for name in IN_CHUNKS if name in names}


def run_quick(names): return run_all(names), {name: run_refused(**o) for name, o in REFUSED.items()}, run_predictions()
