"""Run the benchmarks, all or those named: `python benchmarks/run.py sliced`.
Each is a process of its own and writes results/<name>.json. `gpu`, which needs a GPU, writes results/gpu/*.json"""
import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
NOT_SCRIPTS = {'harness', 'report', 'run'}
NEED_GPU = {'gpu'}

def scripts(folder=HERE):
    "Benchmarks by name"
    return {o.stem: o for o in sorted(folder.glob('*.py')) if o.stem not in NOT_SCRIPTS}

def has_gpu():
    import torch
    return torch.cuda.is_available()

def chosen(names, known, quick=False):
    "Scripts by name: those of `names`, or all that can run here"
    if names: return {o: known[o] for o in names}
    left_out = set() if quick or has_gpu() else NEED_GPU & set(known)
    if left_out: print(f'{", ".join(left_out)}: left out, there is no GPU here', flush=True)
    return {k: v for k, v in known.items() if k not in left_out}

def run_all(found, flags):
    "Run each script, whatever the others do; the names of those that failed"
    failed = []
    for i, (name, path) in enumerate(found.items(), 1):
        print(f'[{i}/{len(found)}] {name}', flush=True)
        start = time.perf_counter()
        if subprocess.run([sys.executable, path, *flags]).returncode: failed.append(name)
        print(f'  {time.perf_counter()-start:.0f} s', flush=True)
    return failed

def main(argv=None):
    p = argparse.ArgumentParser(prog='run.py', description=__doc__)
    p.add_argument('names', nargs='*', help=f'one or more of: {", ".join(scripts())}; none runs all')
    p.add_argument('--quick', action='store_true',
                   help='a few short rounds, to see that it runs; writes to build/benchmarks')
    p.add_argument('--out', type=Path, help='folder for the JSON')
    args, known = p.parse_args(argv), scripts()
    unknown = [o for o in args.names if o not in known]
    if unknown: p.error(f'expected names of {list(known)}, found {unknown}')
    flags = ['--quick']*args.quick + (['--out', str(args.out.resolve())] if args.out else [])
    failed = run_all(chosen(args.names, known, args.quick), flags)
    if failed: sys.exit(f'failed: {", ".join(failed)}')

if __name__ == '__main__': main()
