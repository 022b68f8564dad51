"The record of a run on a GPU: what it counts, what it keeps, and the one that is committed"
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpu_record

PASSES = '''
import pytest
def test_one(): pass
class TestMore:
    @pytest.mark.parametrize('i', range(3))
    def test_two(self, i): assert i < 2
    @pytest.mark.gpu
    def test_card(self): pytest.skip('not here')
@pytest.fixture
def broken(): raise ValueError('no')
def test_three(broken): pass
'''


def test_counts_what_pytest_says_by_file(tmp_path):
    (tmp_path/'tests').mkdir()
    (tmp_path/'tests'/'test_made_up.py').write_text(PASSES)
    report = tmp_path/'report.xml'
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', f'--junitxml={report}', 'tests']
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    found = gpu_record.read_report(report)['tests/test_made_up.py']
    assert {k: found[k] for k in ('passed', 'failed', 'skipped')} == dict(passed=3, failed=2, skipped=1)
    assert found['failures'] == ['test_two[2]', 'test_three']


def ran(passed=1, failed=0, names=()):
    return dict(passed=passed, failed=failed, skipped=0, seconds=1., failures=list(names))


def test_a_record_grows_with_the_same_commit_on_the_same_machine():
    here = dict(machine='a', gpu='b', versions='c', commit='d', changed=False)
    first = gpu_record.joined(None, here, {'tests/test_a.py': ran(3, 1, ['test_x']), 'nbs/a.ipynb': ran()})
    assert first['counts']['tests'] == dict(passed=3, failed=1, skipped=0)
    assert first['counts']['notebooks'] == dict(passed=1, failed=0, skipped=0)
    more = gpu_record.joined(first, here, {'tests/test_a.py': ran(4), 'tests/test_b.py': ran(2)})
    assert more['counts']['tests'] == dict(passed=6, failed=0, skipped=0) and more['counts']['notebooks']['passed'] == 1
    other = gpu_record.joined(more, {**here, 'commit': 'e'}, {'tests/test_b.py': ran(2)})
    assert list(other['files']) == ['tests/test_b.py'] and other['counts']['notebooks'] == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason='says so where there is no GPU')
def test_without_a_gpu_nothing_is_recorded():
    done = subprocess.run([sys.executable, gpu_record.__file__], capture_output=True, text=True)
    assert done.returncode == 1 and 'no GPU here: expected one that torch.cuda finds' in done.stderr


def test_every_test_and_every_notebook_is_run():
    found = gpu_record.all_files()
    assert {'tests/test_gpu_record.py', 'nbs/benchmarks.ipynb', 'nbs/paddy_multi/core/00_values.ipynb'} <= set(found)
    assert len(found) == len(set(found)) and not [o for o in found if 'checkpoint' in Path(o).parent.name]


def test_the_committed_record_if_there_is_one():
    if not gpu_record.RECORD.exists(): pytest.skip('no GPU was at hand')
    record = json.loads(gpu_record.RECORD.read_text(encoding='utf-8'))
    assert record['gpu']['name'] and record['versions']['torch'] and re.fullmatch('[0-9a-f]{40}', record['commit'])
    assert not record['changed'] and record['counts'] == gpu_record.joined(None, {}, record['files'])['counts']
    assert not [o for o in record['files'].values() if o['failed'] != len(o['failures'])]
