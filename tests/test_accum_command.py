"The command paddy-multi accum: what its options do, what it keeps, what it refuses"
import json

import pytest
from typer.testing import CliRunner

from paddy_multi.cli.app import app

SMALL = '--arch', 'test_resnet', '--size', '64', '--bs', '4'


def run(out, *args): return CliRunner().invoke(app, ['accum', '--out', str(out), *args])


def kept(out, *args):
    done = run(out, *SMALL, '--overwrite', *args)
    assert done.exit_code == 0, done.output
    return json.loads((out/'accum.json').read_text()), done.output


def test_all_that_is_printed_is_kept(tmp_path):
    found, said = kept(tmp_path, '--budget', '200MB', '--n-out', '3')
    assert found['settings'] == dict(arch='test_resnet', size='64', bs=4, n_out=3, optimizer='adam', precision='fp16',
                                     frozen=False, budget='200MB', reserve=None)
    assert [o['accum'] for o in found['bytes']] == [1, 2, 4] and found['found']['budget'] == 200*10**6
    assert {'workspace', 'reserved', 'total'} <= set(found['bytes'][0]) and found['kernels'] in ('cuda', 'formula')
    assert 'Predicted MB at the peak' in said and 'Counted: training, validation in batches of 4' in said
    assert (tmp_path/'accum.png').read_bytes()[:4] == b'\x89PNG'


@pytest.mark.parametrize('options, precision', [
    pytest.param(('--fp16',), 'fp16', marks=pytest.mark.slow),
    pytest.param(('--fp32',), 'fp32', marks=pytest.mark.slow),
    (('--bf16',), 'bf16')])
def test_precisions(tmp_path, options, precision):
    found, said = kept(tmp_path, *options)
    assert found['settings']['precision'] == precision and f'adam, {precision}' in said


@pytest.mark.slow
def test_options_change_what_is_predicted(tmp_path):
    def total(*args): return kept(tmp_path, *args)[0]['bytes'][0]['total']
    adam, sgd, momentum, frozen = total(), total('--opt', 'sgd'), total('--optimizer', 'momentum'), total('--frozen')
    assert sgd < momentum < adam and frozen < adam
    assert total('--optimizer', 'fused-adamw') <= total('--optimizer', 'adamw') < adam*1.01


def test_nothing_in_reserve(tmp_path):
    assert kept(tmp_path, '--reserve', '0')[0]['found']['reserve'] == 0


@pytest.mark.slow
def test_a_reserve_of_a_size(tmp_path):
    assert kept(tmp_path, '--reserve', '1GB')[0]['found']['reserve'] == 10**9


def test_plans_are_printed_and_kept(tmp_path):
    found, said = kept(tmp_path, '--plan', '--frozen', '--budget', '100MB')
    assert found['settings']['frozen'] and len(found['plans']) > 1
    assert 'plans fit 100 MB' in said and max(map(len, said.splitlines())) <= 120
    settings = dict(precision='fp16', optimizer='as is', checkpointing=False)
    own = [o for o in found['plans'] if settings.items() <= o.items()]
    assert [(o['accum'], o['total']) for o in own] == [(found['found']['accum'] or 4, found['found']['total'])]


@pytest.mark.parametrize('options, said, code', [
    (('--optimizer', 'lion'), "'lion' is not one of 'adam', 'adamw', 'fused-adamw'", 2),
    (('--bf16', '--fp16'), 'expected one precision, found two', 2),
    (('--budget', 'much'), "expected a size such as '16GB'", 1),
    (('--reserve', '16GB', '--budget', '16GB'), 'expected less than the budget of 16GB, found 16GB', 2),
    (('--reserve', '1'), "expected a size such as '16GB'", 1),
    (('--arch', 'resnet'), "timm knows no architecture 'resnet'", 1),
    (('--bs', '0'), 'greater than or equal to 1', 2)])
def test_refused_before_anything_is_written(tmp_path, options, said, code):
    done = run(tmp_path/'out', *options)
    assert done.exit_code == code and said in ' '.join(done.output.split()).replace('│ ', '')
    assert not (tmp_path/'out').exists()
