"""Plans for five large models under the memory of four cards, predicted on a CPU: what fits, and at what cost.

They are the models of a published training (64 items a batch, fp16, fastai's Adam) that needed accum=2 on 16 GB.
Nothing is timed but the prediction itself, in seconds of the processor."""
import argparse
import time
import warnings
from pathlib import Path

import timm
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat

import harness
from paddy_multi.accumulate.memory import parse_bytes
from paddy_multi.accumulate.plan import plan_training

MODELS = {'convnext_large.fb_in22k': (224, 224), 'convnext_large': (320, 240), 'vit_large_patch16_224': (224, 224),
          'swinv2_large_window12_192': (192, 192), 'swin_large_patch4_window7_224': (224, 224)}
SMALL = {'test_vit': (160, 160), 'test_convnext': (160, 160)}
CARDS = '8GB', '12GB', '16GB', '24GB'

def learner(arch, size, bs=64):
    items = [(torch.zeros(3, *size), torch.tensor(0))]*bs
    dls = DataLoaders(*[DataLoader(items, bs=bs, num_workers=0)]*2)
    model = timm.create_model(arch, pretrained=False, num_classes=10)
    return Learner(dls, model, loss_func=CrossEntropyLossFlat()).to_fp16()

def described(plan):
    "Chunks a batch, and the GB that they need"
    return f'{plan.accum}: {plan.needs/1e9:.1f}'

def named(arch, size):
    "The model, with the size of its pictures where its name does not say it"
    return arch if arch.endswith(f'_{size[0]}') else f'{arch.split(".")[0]} {size[0]}x{size[1]}'

def rows(arch, size):
    "With and without checkpointing, for each card the fewest chunks with the same updates; and the extra arithmetic"
    learn, start = learner(arch, size), time.process_time()
    plans = plan_training(learn, CARDS[-1], accums=(1, 2, 4, 8), precisions=['fp16'], optimizers=['as is'],
                          frozen=[False], valid=False).plans
    seconds = time.process_time()-start
    for way in (False, True):
        own = sorted((o for o in plans if o.checkpointing == way), key=lambda o: o.accum)
        fits = {card: next((described(o) for o in own if o.needs <= parse_bytes(card)), 'none') for card in CARDS}
        yield {'model': named(arch, size), 'checkpointing': 'yes' if way else 'no', **fits,
               'more FLOPs': round(own[0].extra, 2), 'CPU s': round(seconds, 1)}

def measure(quick=False, log=print):
    torch.set_num_threads(1)
    result = dict(name='plan', title='Plans for five large models',
                  question='Which way to train 64 items in fp16 with the same updates fits which card?',
                  about=harness.about('plan', None, 1, 'processor', quick), rows=[])
    for arch, size in (SMALL if quick else MODELS).items():
        for row in rows(arch, size):
            result['rows'].append(row)
            log('  ' + ' | '.join(map(str, row.values())), flush=True)
    return result

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--quick', action='store_true', help='two small models; writes to build/benchmarks')
    p.add_argument('--out', type=Path, help='folder for the JSON')
    args = p.parse_args(argv)
    warnings.filterwarnings('ignore')
    harness.save_table(measure(args.quick), args.out)

if __name__ == '__main__': main()
