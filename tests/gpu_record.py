"""Run everything on a GPU and keep a record: `make test-gpu`; `python tests/gpu_record.py FILE...` runs some

The record is tests/gpu_record.json: machine, versions, commit, counts and failures by name, of tests and of notebooks.
Files that are run add to a record of the same commit on the same machine and take the place of any other.
"""
import json
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT/'tests'/'gpu_record.json'
sys.path.insert(0, str(ROOT/'benchmarks'))

# --- where ----------------------------------------------------------------------------------------------------------
def git(*args): return subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()

def where():
    "Machine, versions and commit; `changed` files are those that differ from it"
    from gpu import card
    from harness import machine, versions
    return dict(machine=machine(), gpu=card(), versions=versions(), commit=git('rev-parse', 'HEAD') or None,
                changed=bool(git('status', '--porcelain', '-uno', '--', '.', ':!tests/gpu_record.json')))

# --- tests ----------------------------------------------------------------------------------------------------------
def outcome(case):
    "'passed', 'skipped' or 'failed', errors among them"
    found = {o.tag for o in case}
    return 'failed' if found & {'failure', 'error'} else 'skipped' if 'skipped' in found else 'passed'

def read_report(path):
    "What pytest's XML says, by file: how many passed, failed and were skipped, which failed, and the seconds"
    files = {}
    for case in ElementTree.parse(path).iter('testcase'):
        name = '/'.join(case.get('classname').split('.')[:2])+'.py'
        o = files.setdefault(name, dict(passed=0, failed=0, skipped=0, seconds=0., failures=[]))
        o[outcome(case)] += 1
        o['seconds'] += float(case.get('time'))
        if outcome(case) == 'failed': o['failures'].append(case.get('name'))
    return {k: {**o, 'seconds': round(o['seconds'], 1)} for k, o in sorted(files.items())}

def run_tests(files):
    "pytest on `files`, slow ones too, in one process"
    with TemporaryDirectory() as folder:
        report = Path(folder)/'report.xml'
        command = [sys.executable, '-m', 'pytest', '-q', '-m', 'not docs', f'--junitxml={report}', *files]
        done = subprocess.run(command, cwd=ROOT)
        if not report.exists(): sys.exit(f'pytest ended with {done.returncode} and left no report')
        return read_report(report)

# --- notebooks ------------------------------------------------------------------------------------------------------
def run_notebook(path):
    "One notebook in this process, as nbdev_test runs it"
    from nbdev.test import test_nb
    start = time.perf_counter()
    passed, _ = test_nb(ROOT/path, skip_flags=[], force_flags=['slow'], basepath=ROOT)
    return dict(passed=int(passed), failed=int(not passed), skipped=0, seconds=round(time.perf_counter()-start, 1),
                failures=[] if passed else [Path(path).name])

def run_notebooks(files):
    "Each in a process of its own, one after the other"
    found = {}
    with ProcessPoolExecutor(1, get_context('spawn'), max_tasks_per_child=1) as pool:
        for path in files:
            found[path] = pool.submit(run_notebook, path).result()
            print(path, 'failed' if found[path]['failed'] else 'passed', flush=True)
    return found

# --- the record -----------------------------------------------------------------------------------------------------
def counts(files):
    total = Counter()
    for o in files.values(): total.update({k: o[k] for k in ('passed', 'failed', 'skipped')})
    return dict(total)

def joined(old, here, found):
    "The record `old` with what was `found`; `old` is left behind where machine, versions or commit are others"
    same = old and all(old[k] == here[k] for k in here)
    files = {**(old['files'] if same else {}), **found}
    parts = {what: {k: o for k, o in files.items() if k.endswith(end)} for what, end in
             (('tests', '.py'), ('notebooks', '.ipynb'))}
    return dict(**here, date=time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime()),
                counts={what: counts(o) for what, o in parts.items()}, files=dict(sorted(files.items())))

def all_files():
    listed = lambda folder, pattern: [o.relative_to(ROOT).as_posix() for o in sorted((ROOT/folder).rglob(pattern))]
    return listed('tests', 'test_*.py') + [o for o in listed('nbs', '*.ipynb') if '.ipynb_checkpoints' not in o]

def main(argv):
    if not torch.cuda.is_available():
        sys.exit('no GPU here: expected one that torch.cuda finds. `make test` runs on the CPU, and '
                 '`pytest --second-device` on a device that refuses what a GPU would')
    files, here = argv or all_files(), where()
    tests = [o for o in files if o.endswith('.py')]
    found = run_tests(tests) if tests else {}
    found.update(run_notebooks([o for o in files if o.endswith('.ipynb')]))
    old = json.loads(RECORD.read_text(encoding='utf-8')) if RECORD.exists() else None
    record = joined(old, here, found)
    RECORD.write_text(json.dumps(record, indent=1)+'\n', encoding='utf-8')
    failed = [f'{k}: {", ".join(o["failures"])}' for k, o in found.items() if o['failed']]
    print(record['counts'])
    if failed: sys.exit('\n'.join(['failed:', *failed]))

if __name__ == '__main__': main(sys.argv[1:])
