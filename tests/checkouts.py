"Commands in copied checkouts, and notebooks to put into them"
import json
import os
import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent


def run(command, *args, **kwargs):
    "What a command of this environment does"
    return subprocess.run([str(o) for o in (BIN/command, *args)], capture_output=True, text=True, **kwargs)


def in_checkout(folder, command, *args):
    "What `command` does in a folder of a copied checkout, whose packages come before the installed ones"
    root = next(p for p in (folder, *folder.parents) if (p/'settings.ini').exists())
    env = os.environ | dict(PYTHONPATH=str(root), PYTHONDONTWRITEBYTECODE='1')
    env.pop('IN_TEST', None)  # with it nbdev exports nothing
    return run(command, *args, cwd=folder, env=env)


def succeeds(done): assert done.returncode == 0, done.stdout + done.stderr


def notebook(path, *sources):
    "Write a clean notebook with a code cell for each of `sources`"
    clean = dict(cell_type='code', execution_count=None, metadata={}, outputs=[])
    cells = [clean | dict(id=f'c{i}', source=s.splitlines(True)) for i, s in enumerate(sources)]
    nb = dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(nb, indent=1, sort_keys=True) + '\n')
    return path
