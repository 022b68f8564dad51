"""One way to measure everything: variants take turns in one process, beside a control that shows chance alone.

A benchmark is a script that lists `Case`s and calls `main`. In every round each variant of a case runs once, in an
order that rotates and turns round, and is compared with the baseline *of the same round*: what slows the machine for
a second slows both. The baseline runs a second time under another name (A/A): its ratio to itself is the noise floor
for every other ratio.
"""
import argparse
import ctypes
import json
import os
import platform
import re
import sys
import time
import timeit
import traceback
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from fastai.torch_core import set_seed
from scipy.stats import quantile_test
from torch.utils.benchmark import timer  # waits for an accelerator to finish before it reads the clock

HERE = Path(__file__).resolve().parent
RESULTS = HERE/'results'
TABLES = RESULTS/'tables'
QUICK = HERE.parent/'build'/'benchmarks'
# The second does not count while a neighbour runs, nor while it waits
CLOCKS = dict(wall=timer, processor=time.process_time)
PACKAGES = ('torch', 'fastai', 'timm', 'numpy', 'paddy-multi')

# --- what is measured -----------------------------------------------------------------------------------------------
@dataclass
class Variant:
    "Code to time: `run()`, or `run(prepare())` when it needs something fresh each time"
    run: Callable
    prepare: Callable = None  # makes the argument of `run`, untimed
    measure: Callable = None  # turns what `run` returned into a dict of numbers (quality, bytes), untimed

    @property
    def single(self): return bool(self.prepare or self.measure)  # then a block is one call

@dataclass
class Case:
    "Variants of one task, the baseline first"
    name: str
    make: Callable  # () -> dict of name -> function or `Variant`; called right after the seed is set
    params: dict = field(default_factory=dict)  # what sets this case apart: a column each in the tables
    rounds: int = 48  # a multiple of 6 gives baseline, control and one variant all their orders equally often

def keep_freed_memory():
    "Have glibc keep what is freed, as a long training does"
    # Else sides differ by how often they fetch it again, in thousands of page faults
    if platform.libc_ver()[0] != 'glibc': return
    trim_threshold, mmap_max = -1, -4
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31-1)

# --- measuring ------------------------------------------------------------------------------------------------------
def orders(names, rounds):
    "The order of each round: every name comes first and last equally often, before and after each neighbour too"
    for i in range(rounds):
        k = i//2 % len(names)
        order = names[k:] + names[:k]
        yield order[::-1] if i%2 else order

def time_block(variant, number, clock=timer):
    "Seconds per call of `number` calls in a row, and the extra measures; `timeit` keeps the garbage collector out"
    args, results = (variant.prepare(),) if variant.prepare else (), []
    call = partial(variant.run, *args)
    timed = (lambda: results.append(call())) if variant.measure else call
    seconds = timeit.Timer(timed, timer=clock).timeit(number)/number
    return seconds, variant.measure(results[-1]) if variant.measure else {}

def block_size(variant, block, clock=timer):
    "How many calls last at least `block` seconds"
    number = 1
    while not variant.single and time_block(variant, number, clock)[0]*number < block: number *= 2
    return number

def spread(values):
    "Median with its 95% interval (distribution-free, None under 6 values), quartiles and range, to 5 digits"
    low, high = quantile_test(values, q=0, p=.5).confidence_interval(.95) if len(values) > 5 else (None, None)
    q1, median, q3 = np.percentile(values, [25, 50, 75])
    res = dict(median=median, low=low, high=high, q1=q1, q3=q3, min=min(values), max=max(values))
    return {k: None if v is None else digits(v) for k, v in res.items()}

def digits(x, n=5): return float(f'{x:.{n}g}')

def control_name(baseline): return f'{baseline} (A/A)'

class Turns:
    "Variants of a case taking turns; one that fails drops out, with its error"
    def __init__(self, variants, block, clock):
        variants = {k: v if isinstance(v, Variant) else Variant(v) for k, v in variants.items()}
        self.baseline = next(iter(variants))
        first = variants[self.baseline]
        self.variants = {self.baseline: first, control_name(self.baseline): first, **variants}
        self.seconds = {k: [] for k in self.variants}
        self.extra = {k: [] for k in self.variants}
        self.errors, self.number = {}, {}
        self.block, self.clock = block, clock

    def warm_up(self, times):
        "Run each variant untimed, then settle how many calls make a block: the control takes the baseline's"
        def untimed(variant):
            for _ in range(times): time_block(variant, 1, self.clock)
        def settle(name, variant): self.number[name] = block_size(variant, self.block, self.clock)
        for name in self.variants: self.attempt(name, untimed)
        for name in self.variants: self.attempt(name, partial(settle, name))
        self.number[control_name(self.baseline)] = self.number.get(self.baseline)

    def attempt(self, name, do):
        if name in self.errors: return
        try: do(self.variants[name])
        except Exception as e:
            traceback.print_exc()
            self.errors[name] = f'{type(e).__name__}: {e}'

    def play(self, rounds):
        for order in orders(list(self.variants), rounds):
            for name in order: self.attempt(name, partial(self.one, name))
        return self

    def one(self, name, variant):
        seconds, extra = time_block(variant, self.number[name], self.clock)
        self.seconds[name].append(digits(seconds))
        self.extra[name].append(extra)

    def report(self, name):
        "What is kept of one variant; ratios and differences are those of the same round"
        mine, base, extra = self.seconds[name], self.seconds[self.baseline], self.extra[name]
        pairs = list(zip(mine, base)) if name != self.baseline else []
        return dict(name=name, control=name == control_name(self.baseline),
                    error=self.errors.get(name), calls=self.number.get(name),
                    seconds=spread(mine) if mine else None,
                    ratio=spread([a/b for a, b in pairs]) if pairs else None,
                    added=spread([a-b for a, b in pairs]) if pairs else None,
                    extra={k: spread([o[k] for o in extra]) for k in (extra[0] if extra else {})}, rounds=mine)

def compare(case, seed=42, rounds=None, block=.02, warmup=3, clock=timer):
    "All that was measured of one case, as a dict of plain numbers"
    res = dict(name=case.name, params=case.params, error=None, variants=[])
    try:
        set_seed(seed)
        variants = case.make()
        baseline = next(iter(variants))
        if control_name(baseline) in variants: raise ValueError('the name of the control is taken by a variant')
        turns = Turns(variants, block, clock)
    except Exception as e:
        traceback.print_exc()
        return {**res, 'error': f'{type(e).__name__}: {e}'}
    turns.warm_up(warmup)
    turns.play(rounds or case.rounds)
    return {**res, 'variants': [turns.report(name) for name in turns.variants]}

def failures(result):
    "Every error in a result, as text"
    found = []
    for case in result['cases']:
        if case['error']: found.append(f'{case["name"]}: {case["error"]}')
        found += [f'{case["name"]}, {o["name"]}: {o["error"]}' for o in case['variants'] if o['error']]
    return found

# --- where it was measured ------------------------------------------------------------------------------------------
def cpu_model():
    info = Path('/proc/cpuinfo')
    found = info.exists() and re.search(r'^model name\s*:\s*(.+)$', info.read_text(), re.M)
    return found[1] if found else platform.processor() or platform.machine()

def machine():
    "The kind of machine: nothing that tells one machine from its twin"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    pages = {'SC_PAGE_SIZE', 'SC_PHYS_PAGES'} <= getattr(os, 'sysconf_names', {}).keys()
    memory = round(os.sysconf('SC_PAGE_SIZE')*os.sysconf('SC_PHYS_PAGES')/2**30, 1) if pages else None
    return dict(cpu=cpu_model(), simd=torch.backends.cpu.get_cpu_capability(), cores=cores, memory_gib=memory,
                arch=platform.machine(),
                system=f'{platform.system()} {".".join(platform.release().split(".")[:2])}',
                accelerator=torch.cuda.get_device_name() if torch.cuda.is_available() else None)

def versions():
    def of(package):
        try: return version(package)
        except PackageNotFoundError: return None
    return dict(python=platform.python_version(), **{o: of(o) for o in PACKAGES})

def about(name, seed, threads, clock, quick):
    load = round(os.getloadavg()[0], 2) if hasattr(os, 'getloadavg') else None
    return dict(machine=machine(), versions=versions(), seeds=dict(all=seed), threads=threads, clock=clock,
                load_before=load, quick=quick,
                date=datetime.now(timezone.utc).strftime('%Y-%m-%d %H:%M UTC'),
                command=f'python benchmarks/run.py {name}{" --quick" if quick else ""}')

# --- keeping it -----------------------------------------------------------------------------------------------------
def dumps(result):
    "JSON in the order of its making, a list of numbers on one line, so that two results can be compared line by line"
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    return re.sub(r'\[\n[-+\d\s.,e]+\]', lambda o: ' '.join(o[0].split()), text) + '\n'

def save(result, folder):
    "Write `result` to `folder`; a quick one never goes where the real ones are"
    folder = Path(folder).resolve()
    if result['about']['quick'] and folder.is_relative_to(RESULTS):
        raise ValueError('a quick result proves nothing: '
                         f'expected a folder other than benchmarks/{RESULTS.name}, choose another --out')
    folder.mkdir(parents=True, exist_ok=True)
    path = folder/f'{result["name"]}.json'
    path.write_text(dumps(result), encoding='utf-8')
    return path

def save_table(result, folder=None):
    "Write a result that takes no turns: compared with targets or with other sizes, so a table apart"
    return save(result, folder or (QUICK if result['about']['quick'] else TABLES))

# --- running it -----------------------------------------------------------------------------------------------------
def line(case):
    "One printed line: every variant's ratio to the baseline with its 95% interval"
    if case['error']: return f'{case["name"]}: FAILED, {case["error"]}'
    def show(o):
        if o['error']: return f'{o["name"]}: FAILED, {o["error"]}'
        if not o['ratio']: return f'{o["name"]} {o["seconds"]["median"]*1e3:.3g} ms'
        r = o['ratio']
        interval = '' if r['low'] is None else f' [{r["low"]:.3f}, {r["high"]:.3f}]'
        return f'{o["name"]} {r["median"]:.3f}{interval}'
    params = ', '.join(f'{k} {v}' for k, v in case['params'].items())
    return f'{case["name"]}{f" ({params})" if params else ""}: ' + ' | '.join(show(o) for o in case['variants'])

def measure(name, title, question, cases, findings=None, seed=42, threads=1, clock='wall', quick=False, log=print):
    "Run all cases by `clock`, 'wall' or 'processor' time; `findings(result)` may add numbers that follow from several"
    if clock not in CLOCKS: raise ValueError(f'expected a clock of {list(CLOCKS)}, found {clock!r}')
    torch.set_num_threads(threads)
    began = about(name, seed, threads, clock, quick)
    result = dict(name=name, title=title, question=question, about=began, findings=[], cases=[])
    speed = dict(rounds=6, block=.001, warmup=1) if quick else {}
    for i, case in enumerate(cases, 1):
        measured = compare(case, seed, clock=CLOCKS[clock], **speed)
        result['cases'].append(measured)
        log(f'  [{i}/{len(cases)}] {line(measured)}', flush=True)
    if findings and not failures(result): result['findings'] = findings(result)
    return result

def main(name, title, question, cases, argv=None, **kwargs):
    "A benchmark's command line; `cases(quick)` lists its cases. A failed variant exits with 1, after the rest is saved"
    p = argparse.ArgumentParser(prog=f'{name}.py', description=question)
    p.add_argument('--quick', action='store_true', help='a few short rounds, to see that it runs')
    p.add_argument('--out', type=Path,
                   help='folder for the JSON; with --quick build/benchmarks, otherwise benchmarks/results')
    args = p.parse_args(argv)
    result = measure(name, title, question, cases(args.quick), quick=args.quick, **kwargs)
    save(result, args.out or (QUICK if args.quick else RESULTS))
    if failed := failures(result): sys.exit('\n'.join(['failed:', *failed]))
