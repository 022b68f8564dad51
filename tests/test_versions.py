"What is imported says nothing of its own, and lower bounds of versions are those that were tried"
import re
import warnings
from configparser import ConfigParser
from pathlib import Path

import pytest

from checkouts import run

ROOT = Path(__file__).parents[1]
ini = ConfigParser(delimiters=['='])
ini.read(ROOT/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
FILES = [p for package in cfg['packages'].split() for p in sorted((ROOT/package).rglob('*.py')) if p.stem != '_nbdev']

IMPORTS = """
import sys, warnings
from importlib import import_module
said = []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    for module in sys.argv[2:]: import_module(module)
for o in caught:
    if o.filename.startswith(sys.argv[1]): print(f'{o.filename}:{o.lineno}: {o.category.__name__}: {o.message}')
"""


# --- warnings -------------------------------------------------------------------------------------------------------
def test_no_file_of_ours_warns_when_it_is_imported():
    modules = ['.'.join(p.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__') for p in FILES]
    done = run('python', '-c', IMPORTS, ROOT, *modules)
    assert len(modules) > 70 and done.returncode == 0, done.stderr
    assert [o for o in done.stdout.splitlines() if '/.venv/' not in o] == []


def test_a_warning_of_ours_is_noticed(tmp_path):
    (tmp_path/'noisy.py').write_text('import warnings\nwarnings.warn("told")\n')
    done = run('python', '-c', IMPORTS, tmp_path, 'noisy', cwd=tmp_path)
    assert done.stdout.endswith('noisy.py:2: UserWarning: told\n'), done.stderr


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_file_of_ours_warns_when_it_is_compiled(path):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        compile(path.read_text(encoding='utf-8'), path, 'exec')


# --- versions -------------------------------------------------------------------------------------------------------
def lower_bounds(key): return dict(re.match(r'([\w.-]+)>=([\d.]+)', o).groups() for o in cfg[key].split())


def pinned(name):
    lines = (ROOT/name).read_text(encoding='utf-8').splitlines()
    return dict(o.split('==') for o in lines if o and not o.startswith('#'))


def test_every_requirement_has_a_lower_bound_and_the_oldest_environment_is_at_it():
    oldest = pinned('constraints-oldest.txt')
    keys = 'requirements', 'parquet_requirements', 'stratify_requirements', 'weights_requirements'
    bounds = {name: bound for key in keys for name, bound in lower_bounds(key).items()}
    def same(found, bound): return found.split('.')[:bound.count('.')+1] == bound.split('.')
    assert len(bounds) >= 14
    assert {name: oldest[name] for name, bound in bounds.items() if not same(oldest[name], bound)} == {}
