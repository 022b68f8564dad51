"The benchmark harness against a clock that tells what it is told, and the committed results against what they must say"
import getpass
import itertools
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'benchmarks'))
import gpu
import harness
import report
import run
from harness import Case, Variant, compare

class Clock:
    "Time passes only when `spend` says so, at a speed that changes by `drift` with every call"
    def __init__(self, drift=1.): self.now, self.speed, self.drift, self.calls = 0., 1., drift, []
    def __call__(self): return self.now
    def spend(self, seconds, name=None):
        self.now += seconds*self.speed
        self.speed *= self.drift
        self.calls.append(name)

def two(clock, a=.002, b=.003): return lambda: {'a': lambda: clock.spend(a, 'a'), 'b': lambda: clock.spend(b, 'b')}

def run_two(clock, **kw): return compare(Case('two', two(clock), **kw), clock=clock)

def by_name(res): return {o['name']: o for o in res['variants']}

def boom(*_): raise ValueError('out of order')

# --- measuring ------------------------------------------------------------------------------------------------------
def test_known_times_give_known_numbers():
    res = by_name(run_two(Clock()))
    assert res['a']['seconds']['median'] == res['a (A/A)']['seconds']['max'] == .002
    assert res['b']['ratio'] == dict.fromkeys(['median', 'low', 'high', 'q1', 'q3', 'min', 'max'], 1.5)
    assert res['b']['added']['median'] == pytest.approx(.001)
    assert res['a (A/A)']['ratio']['median'] == 1 and res['a (A/A)']['added']['median'] == 0
    assert res['a']['ratio'] is None and [o['control'] for o in res.values()] == [False, True, False]

def test_a_machine_that_slows_down_does_not_move_the_ratio():
    res = by_name(compare(Case('two', two(clock := Clock(1.03))), clock=clock, block=0))
    assert res['a']['seconds']['max'] > 20*res['a']['seconds']['min']      # the same code, 20 times slower at the end
    assert res['b']['ratio']['low'] <= 1.5 <= res['b']['ratio']['high']
    assert res['b']['ratio']['median'] == pytest.approx(1.5, rel=.04)
    assert res['a (A/A)']['ratio']['median'] == pytest.approx(1, rel=.04)

def busy(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until: pass

def test_real_clocks():
    sleep = Case('sleep', lambda: {'short': lambda: time.sleep(.002), 'long': lambda: time.sleep(.006)})
    naps = by_name(compare(sleep, rounds=6, block=0))
    assert 1.3 < naps['long']['ratio']['median'] < 5
    mixed = Case('busy', lambda: {'busy': lambda: busy(.004), 'naps too': lambda: (busy(.004), time.sleep(.02))})
    res = by_name(compare(mixed, rounds=6, block=0, clock=harness.CLOCKS['processor']))
    assert .8 < res['naps too']['ratio']['median'] < 1.5                    # a nap takes no processor time

def test_an_unknown_clock_is_refused():
    with pytest.raises(ValueError, match=re.escape("expected a clock of ['wall', 'processor'], found 'sun'")):
        harness.measure('x', 'T', 'Q', [], clock='sun')

def test_baseline_control_and_one_variant_meet_in_every_order():
    assert set(map(tuple, harness.orders([0, 1, 2], 6))) == set(itertools.permutations(range(3)))

@settings(deadline=None)
@given(st.integers(2, 7))
def test_every_variant_has_every_place_equally_often(n):
    rounds = list(harness.orders(list(range(n)), 2*n))
    assert all(sorted(o) == list(range(n)) for o in rounds)
    for place in zip(*rounds): assert sorted(place) == sorted([*range(n)]*2)

def test_calls_alternate():
    clock = Clock()
    compare(Case('two', two(clock)), clock=clock, block=0, warmup=1, rounds=6)
    warm = 3 + 3                                              # one call each, then one each to size the block
    expected = [o[0] for order in harness.orders(['a', 'a (A/A)', 'b'], 6) for o in order]
    assert clock.calls[warm:] == expected and expected[:6] == ['a', 'a', 'b', 'b', 'a', 'a']

def test_blocks_last_long_enough_and_the_control_has_the_baselines():
    res = by_name(compare(Case('two', two(clock := Clock(), .0005, .003)), clock=clock, block=.02))
    calls = {k: o['calls'] for k, o in res.items()}
    assert calls == {'a': 64, 'a (A/A)': 64, 'b': 8}          # powers of 2: 40 and 7 calls fill 20 ms

def test_preparing_and_measuring_are_not_timed():
    clock, made = Clock(), itertools.count()
    def fresh():
        clock.spend(9)
        return next(made)
    def quality(got):
        clock.spend(9)
        return dict(got=got)
    def work(state):
        clock.spend(.5)
        return state
    def make(): return {'a': Variant(work, fresh, quality), 'b': Variant(work, fresh, lambda o: dict(got=7))}
    res = compare(Case('c', make), clock=clock, rounds=6, warmup=0)
    a, control, b = res['variants']
    assert a['seconds']['max'] == b['seconds']['max'] == .5 and a['calls'] == 1
    assert b['extra'] == {'got': dict.fromkeys(['median', 'low', 'high', 'q1', 'q3', 'min', 'max'], 7.)}
    assert next(made) == 18                                   # blocks, each its own
    assert a['extra']['got']['min'] == 0 and control['extra']['got']['min'] == 1

def test_spread_by_hand():
    assert harness.spread([3, 1, 2, 5, 4, 6]) == dict(median=3.5, low=1, high=6, q1=2.25, q3=4.75, min=1, max=6)
    # P(2nd < median < 9th value) = 1 - (1+9+1)/2^9 = .979, P(2nd, 8th) = 1 - 20/2^9 = .961
    nine = harness.spread(list(range(1, 10)))
    assert (nine['low'], nine['high']) == (2, 8)
    assert harness.spread([1, 2, 3, 4, 5])['low'] is None     # all five on one side: 2/2^5 is more than 5%

@settings(deadline=None)
@given(st.integers(6, 60), st.integers(0, 10**6))
def test_interval_holds_the_median(n, seed):
    s = harness.spread(np.random.default_rng(seed).lognormal(size=n).tolist())
    assert s['min'] <= s['low'] <= s['median'] <= s['high'] <= s['max'] and s['q1'] <= s['median'] <= s['q3']

def test_the_seed_is_set_before_each_case():
    import torch
    def draw():
        seen.append(torch.rand(2).tolist())
        return {'a': lambda: torch.rand(1)}
    seen = []
    for seed in (1, 1, 2): compare(Case('draw', draw), seed=seed, rounds=6, block=0)
    assert seen[0] == seen[1] != seen[2]

# --- faults ---------------------------------------------------------------------------------------------------------
def test_a_failing_variant_is_told_and_the_others_go_on(capsys):
    clock = Clock()
    res = compare(Case('c', lambda: {**two(clock)(), 'broken': boom}), clock=clock, rounds=6)
    assert harness.failures(dict(cases=[res])) == ['c, broken: ValueError: out of order']
    a, _, b, broken = res['variants']
    assert b['ratio']['median'] == 1.5 and len(b['rounds']) == 6 and a['error'] is None
    assert broken['seconds'] is broken['ratio'] is None and broken['rounds'] == []
    assert 'broken: FAILED, ValueError: out of order' in harness.line(res)
    assert 'in boom' in capsys.readouterr().err                              # the traceback is not swallowed

def test_a_variant_that_fails_late_keeps_what_it_measured():
    clock, left = Clock(), iter([.003]*5)
    case = Case('c', lambda: {'a': lambda: clock.spend(.002), 'b': lambda: clock.spend(next(left))})
    res = compare(case, clock=clock, block=0, warmup=1, rounds=6)
    b = res['variants'][2]
    assert b['error'].startswith('StopIteration') and b['rounds'] == [.003]*3 and b['ratio']['median'] == 1.5
    assert len(res['variants'][0]['rounds']) == 6

def test_a_failing_baseline_leaves_times_without_ratios():
    res = compare(Case('c', lambda: {'a': boom, 'b': lambda: clock.spend(.1)}), clock=(clock := Clock()), rounds=6)
    assert [bool(o['error']) for o in res['variants']] == [True, True, False]
    assert res['variants'][2]['seconds']['median'] == pytest.approx(.1) and res['variants'][2]['ratio'] is None

def test_a_case_that_cannot_be_made():
    res = compare(Case('c', boom))
    assert res['error'] == 'ValueError: out of order'
    assert harness.failures(dict(cases=[res])) == ['c: ValueError: out of order']
    taken = compare(Case('c', lambda: {'a': boom, 'a (A/A)': boom}))
    assert 'the name of the control is taken by a variant' in taken['error']

def test_a_script_with_a_failure_saves_the_rest_and_exits_with_1(tmp_path):
    def cases(quick): return [Case('good', lambda: {'a': int, 'b': float}), Case('bad', boom)]
    with pytest.raises(SystemExit, match='failed:\nbad: ValueError: out of order'):
        harness.main('mixed', 'Mixed', 'Both?', cases, ['--quick', '--out', str(tmp_path)], log=lambda *_, **__: None)
    good, bad = json.loads((tmp_path/'mixed.json').read_text())['cases']
    assert len(good['variants']) == 3 and bad['error']

def test_quick_results_never_land_among_the_real_ones():
    def kept(): return {p: p.read_bytes() for p in harness.RESULTS.rglob('*.json')}
    before = kept()
    message = ('a quick result proves nothing: expected a folder other than benchmarks/results, '
               'choose another --out')
    for folder in (harness.RESULTS/'..'/'results', harness.TABLES, harness.RESULTS/'gpu'):
        with pytest.raises(ValueError, match=message):
            harness.main('sliced', 'T', 'Q', lambda quick: [], ['--quick', '--out', str(folder)])
    assert before == kept()
    assert harness.QUICK not in (harness.RESULTS, harness.TABLES)

# --- keeping and showing it -----------------------------------------------------------------------------------------
@pytest.fixture
def result():
    clock = Clock()
    wobbly = itertools.cycle([.002, .0022, .0018, .0021])
    def even(): return {'a': lambda: clock.spend(next(wobbly)), 'b': lambda: clock.spend(.002)}
    cases = [Case('two', two(clock), dict(n=1)), Case('even', even, dict(n=2))]
    about = harness.about('made_up', seed=3, threads=1, clock='wall', quick=False)
    return dict(name='made_up', title='Made up', question='?', about=about, findings=[],
                cases=[compare(o, clock=clock, block=0) for o in cases])

def test_json_round_trip(result, tmp_path):
    path = harness.save(result, tmp_path)
    text = path.read_text()
    assert json.loads(text) == result == report.results(tmp_path)[0]
    assert harness.dumps(json.loads(text)) == text                            # same keys in the same order
    assert re.search(r'"rounds": \[ 0\.00\d+(, 0\.00\d+)+ \]', text)          # one line per list of numbers
    with pytest.raises(ValueError): harness.dumps(dict(x=float('nan')))

def test_strings_in_brackets_survive(): assert json.loads(harness.dumps(dict(a='[1,   2]  '))) == dict(a='[1,   2]  ')

def test_tables_say_what_differs(result):
    df, times = report.ratios(result), report.times(result)
    assert list(df.index) == list(times.index) == ['two, 1 n', 'even, 2 n'] and list(df.differs) == ['slower', 'no']
    assert df.iloc[0].tolist() == ['b', '1.500 [1.500, 1.500]', '1.000 [1.000, 1.000]', 'slower']
    assert times.iloc[0].tolist() == ['b', '2 ms [2 ms, 2 ms]', '1 ms [1 ms, 1 ms]', '0 ns [0 ns, 0 ns]']
    assert report.provenance([result]).loc['seed', 'made_up'] == '3'

def test_a_faster_variant_is_called_faster():
    case = compare(Case('two', two(clock := Clock(), .003, .002)), clock=clock)
    assert report.ratios(dict(cases=[case])).differs.tolist() == ['faster']

def test_too_few_rounds_claim_nothing():
    case = compare(Case('two', two(clock := Clock())), clock=clock, rounds=5)
    assert 'b 1.500 |' in harness.line(case)+' |'
    df = report.ratios(dict(cases=[case]))
    assert df.differs.tolist() == ['too few rounds']
    assert df.ratio.tolist() == ['1.500 [1.500, 1.500]']      # then: the range

def test_extra_measures_stand_side_by_side():
    def of(x): return Variant(lambda: x, measure=lambda o: dict(loss=o))
    case = compare(Case('c', lambda: {'a': of(.5), 'b': of(.25)}), rounds=6)
    row = report.extras(dict(cases=[case])).iloc[0]
    assert (row['loss, a'], row['loss, b']) == ('0.5 [0.5, 0.5]', '0.25 [0.25, 0.25]')

def test_items_a_second_and_what_was_exchanged():
    clock, sent = Clock(), {'meetings': 3, 'gradients, calls': 2, 'gradients, MB': 5}
    faster = Variant(lambda: clock.spend(.001), measure=lambda _: sent)
    def make(): return {'one': lambda: clock.spend(.002), 'two': faster}
    res = dict(cases=[compare(Case('c', make, dict(items=4)), clock=clock, block=0)])
    one, control, two = report.items_per_second(res).values.tolist()
    assert one == ['one', '2,000', '2,000 to 2,000', ''] and control[3] == '1.00 [1.00, 1.00]'
    assert two == ['two', '4,000', '4,000 to 4,000', '2.00 [2.00, 2.00]']
    assert report.exchanged(res).values.tolist() == [['two', '3', '2 of 2.5 MB']]

def test_a_plot_shows_every_variant_and_control(result):
    ax, = report.plot(result).axes
    assert [o.get_text() for o in ax.get_yticklabels()] == ['two\n1 n', 'even\n2 n']
    dots = [o.get_xdata()[0] for o in ax.get_lines() if o.get_marker() == 'o']
    assert len(dots) == 4 and dots[:2] == [1, 1.5]
    report.plt.close('all')

def test_a_failed_result_is_not_shown(result):
    result['cases'][0]['variants'][2]['error'] = 'ValueError: no'
    with pytest.raises(ValueError, match="two failed: .*ValueError: no"): report.ratios(result)

@pytest.mark.parametrize('seconds,text', [
    (2.5, '2.5 s'), (.0123, '12.3 ms'), (-4e-5, '-40 µs'), (3e-8, '30 ns'), (0, '0 ns')])
def test_times_as_text(seconds, text): assert report.time_text(seconds) == text

# --- what is committed ----------------------------------------------------------------------------------------------
def test_every_script_has_its_result():
    assert {o['name'] for o in (*report.results(), *report.tables())} == set(run.scripts()) - run.NEED_GPU

def all_of(*folders):
    paths = sorted(p for o in folders for p in o.glob('*.json'))
    return pytest.mark.parametrize('path', paths, ids=lambda p: p.stem)

@all_of(harness.RESULTS, harness.TABLES)
class TestCommitted:
    def test_says_where_and_how(self, path):
        a = json.loads(path.read_text())['about']
        assert not a['quick'] and all(a['machine'][k] for k in ('cpu', 'cores', 'memory_gib', 'arch', 'system'))
        assert all(a['versions'][k] for k in ('python', *harness.PACKAGES))
        assert a['seeds'] and a['threads'] > 0 and a['clock'] in harness.CLOCKS
        assert a['command'] == f'python benchmarks/run.py {path.stem}'
        assert re.fullmatch(r'\d{4}-\d\d-\d\d \d\d:\d\d UTC', a['date'])

    def test_names_no_machine(self, path):
        text = path.read_text()
        assert not re.search(r'/(tmp|home|root|usr|work|Users)\b|[A-Z]:\\\\|localhost', text)
        assert platform.node() not in text and f'"{getpass.getuser()}"' not in text

@all_of(harness.RESULTS)
class TestTurns:
    def test_has_no_failure_and_a_control_in_each_case(self, path):
        res = json.loads(path.read_text())
        assert res['cases'] and not harness.failures(res)
        for case in res['cases']:
            baseline, control, *others = case['variants']
            assert control['control'] and control['name'] == f'{baseline["name"]} (A/A)' and others
            assert not any(o['control'] for o in (baseline, *others))

    def test_summaries_follow_from_the_rounds(self, path):
        for case in json.loads(path.read_text())['cases']:
            base = case['variants'][0]['rounds']
            for o in case['variants']:
                assert o['seconds']['median'] == pytest.approx(np.median(o['rounds']), rel=1e-4)
                if not o['ratio']: continue
                assert o['ratio'] == harness.spread([a/b for a, b in zip(o['rounds'], base, strict=True)])

@all_of(harness.TABLES)
def test_what_is_said_of_a_target_follows_from_the_runs(path):
    rows = json.loads(path.read_text())['rows']
    assert rows
    for o in rows:
        if 'target' not in o: continue
        assert o['mean'] == pytest.approx(np.mean(o['values']), rel=1e-4)
        assert o['met'] == (o['mean'] <= o['target'] if o['at_most'] else o['mean'] >= o['target'])

# --- on a GPU, where one was at hand ----------------------------------------------------------------------------------
@all_of(harness.RESULTS/'gpu')
class TestGpu:
    def test_says_which_gpu_and_how(self, path):
        res = json.loads(path.read_text())
        a = res['about']
        assert a['machine']['accelerator'] and all(a['versions'][k] for k in ('python', 'torch', 'fastai', 'timm'))
        assert res['name'] == path.stem
        if path.stem.startswith('imported'): assert a['commit'] and 'earlier version' in a['note']
        else:
            assert path.stem in gpu.SECTIONS and not a['quick'] and a['gpu']['name'] == a['machine']['accelerator']
            assert a['command'] == 'python benchmarks/run.py gpu' and not gpu.errors(res)

    def test_names_no_machine(self, path):
        assert not re.search(r'/(tmp|home|root|usr|work|Users)\b|[A-Z]:\\\\|localhost', path.read_text())

def test_memory_rows_by_hand():
    def row(arch, accum, **kwargs): return dict(arch=arch, size=8, bs=4, precision='fp16', accum=accum, **kwargs)
    rows = [row('a', 1, predicted=9*10**8, measured=10**9, reserved=12*10**8),
            row('b', 2, predicted=dict(total=10**9, workspace=10**8), measured=11*10**8, reserved=None),
            row('c', 2, predicted=1, measured=None)]
    df = report.gpu_memory(rows)
    assert df['off, MB'].tolist() == [-100, 0] and df['reserved over allocated'].tolist() == ['1.20', '']
    assert df['predicted, GB'].tolist() == ['0.90', '1.10']
    assert [o['arch'] for o in report.worst_predicted(rows, 1)] == ['a']
    ax, = report.plot_gpu_memory(rows).axes                       # off by 100 MB, and by none
    assert [o.get_text() for o in ax.texts] == ['a', 'b']
    report.plt.close('all')

def test_without_a_gpu_nothing_is_measured(capsys):
    if gpu.on_gpu(): pytest.skip('there is one')
    with pytest.raises(SystemExit, match='no GPU here: expected one that torch.cuda finds'): gpu.main([])
    known = dict(gpu='a', sliced='b')
    assert run.chosen([], known) == dict(sliced='b') and run.chosen([], known, quick=True) == known
    assert 'gpu: left out, there is no GPU here' in capsys.readouterr().out
    assert run.chosen(['gpu'], known) == dict(gpu='a')             # and says so itself

def test_an_unknown_section_is_refused(capsys):
    with pytest.raises(SystemExit): gpu.main(['memry'])
    assert re.search(r"expected sections of \['memory', .*\], found \['memry'\]", capsys.readouterr().err)

SECONDS = {'dense', 'loss_launches'}  # others take the same way with larger models, or in new processes

def fast_or_slow(o): return pytest.param(o, marks=[] if o in SECONDS else pytest.mark.slow)

@pytest.mark.parametrize('name', [fast_or_slow(o) for o in gpu.SECTIONS])
def test_a_section_runs_without_a_gpu(name, tmp_path):
    gpu.main([name, '--quick', '--out', str(tmp_path)])
    res = report.gpu(tmp_path)[name]
    assert res['about']['quick'] and not gpu.errors(res) and (res['cases'] if name == 'speed' else res['rows'])

def test_about_names_no_machine():
    text = harness.dumps(harness.about('x', 1, 1, 'wall', False))
    assert platform.node() not in text and str(Path.home()) not in text
    assert '/' not in text.replace('benchmarks/run.py', '')

# --- running it -----------------------------------------------------------------------------------------------------
IN_TURNS, TABLE = 'sliced', 'collab_growth'  # one of either kind

def quick_or_slow(name):
    "The others take the same way, each a process of seconds"
    return pytest.param(name, marks=[] if name in (IN_TURNS, TABLE) else pytest.mark.slow)

@pytest.mark.parametrize('name', [quick_or_slow(o) for o in run.scripts() if o not in run.NEED_GPU])
def test_quick_mode(name, tmp_path):
    command = [sys.executable, ROOT/'benchmarks'/'run.py', name, '--quick', '--out', tmp_path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    res, = report.results(tmp_path)
    assert res['about']['quick'] and f'[1/1] {name}' in done.stdout
    if 'rows' in res: assert res['rows']
    else: assert not harness.failures(res) and not report.ratios(res).empty

def test_an_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit): run.main(['slicd'])
    assert re.search(r"expected names of \[.*'sliced'.*\], found \['slicd'\]", capsys.readouterr().err)

def test_one_failing_script_does_not_stop_the_next(tmp_path, capfd):
    (tmp_path/'a.py').write_text('raise SystemExit(3)')
    (tmp_path/'b.py').write_text('import sys; print("b ran with", sys.argv[1:])')
    assert run.run_all(run.scripts(tmp_path), ['--quick']) == ['a']
    assert "b ran with ['--quick']" in capfd.readouterr().out
