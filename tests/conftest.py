"What several files of tests share"
import shutil
import subprocess
from pathlib import Path

import pytest
from fastai.torch_core import set_seed
from hypothesis import settings

ROOT = Path(__file__).parents[1]

# The same examples every time, so that a change is judged by itself; `make test-all` looks for new ones
settings.register_profile('same', derandomize=True)
settings.register_profile('explore', print_blob=True)
settings.load_profile('same')


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
