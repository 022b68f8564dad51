"What several files of tests share"
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from fastai.torch_core import defaults, set_seed
from hypothesis import settings

ROOT = Path(__file__).parents[1]

# The same examples every time, so that a change is judged by itself; `make test-all` looks for new ones
settings.register_profile('same', derandomize=True)
settings.register_profile('explore', print_blob=True)
settings.load_profile('same')


# Convolutions on a GPU would else round to 10 bits, and sums on two devices differ by more than their order
torch.backends.cudnn.allow_tf32 = False


# --- devices --------------------------------------------------------------------------------------------------------
def pytest_addoption(parser):
    parser.addoption('--second-device', action='store_true',
                     help='fastai puts everything on a device that refuses what a GPU would (second_device.py)')


def pytest_configure(config):
    if config.getoption('--second-device'):
        import second_device
        second_device.start(ROOT/'build'/'second_device')


def pytest_collection_modifyitems(items):
    "What is marked `gpu` runs where there is one"
    if torch.cuda.is_available(): return
    for item in items:
        if item.get_closest_marker('gpu'): item.add_marker(pytest.mark.skip(reason='needs a GPU'))


@pytest.fixture
def on_cpu(monkeypatch):
    "fastai stays on the CPU, in new processes too, for what is asked of a CPU alone: the same bits, its memory"
    if torch.cuda.is_available(): torch.cuda.init()  # this process has seen its GPU
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    monkeypatch.setattr(defaults, 'use_cuda', False)


# --- what every test finds ------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def seeded():
    "Whatever ran before it in the same process, a test draws the same numbers"
    set_seed(0)


@pytest.fixture
def checkout(tmp_path):
    "A copy of the working tree as git sees it, with what is new and without what is ignored: free to be spoiled"
    command = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in sorted({o for o in listed.split('\0') if o}):
        if not (ROOT/name).is_file(): continue  # removed, and not yet committed
        (tmp_path/'checkout'/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/name, tmp_path/'checkout'/name)
    return tmp_path/'checkout'


@pytest.fixture
def changes(checkout):
    "A function that lists the files of `checkout` that were made, changed or removed since the test began"
    def files(): return {p.relative_to(checkout).as_posix(): p.read_bytes() for p in checkout.rglob('*') if p.is_file()}
    before = files()
    def changed():
        after = files()
        return sorted(o for o in before.keys() | after.keys() if before.get(o) != after.get(o))
    return changed
