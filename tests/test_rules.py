"The rules of the layout find what breaks them: each is tried on bad examples, and on good ones beside them"
import pytest

import rules

OURS = 'from paddy_multi.core.checks import test_close'
HOUSE = {'paddy_multi.core.values': ('paddy_multi', 0, '00_values.ipynb'),
         'paddy_multi.core.files': ('paddy_multi', 0, '01_files.ipynb'),
         'paddy_multi.data.loaders': ('paddy_multi', 1, '00_loaders.ipynb'),
         'collab_deep.models.dot': ('collab_deep', 0, '00_dot.ipynb')}


@pytest.mark.parametrize('module, source, found', [
    ('core.files', 'from ..data.loaders import x', 'paddy_multi.data.loaders'),         # a floor up
    ('core.files', 'from paddy_multi.data.loaders import x', 'paddy_multi.data.loaders'),
    ('core.files', 'import paddy_multi.data.loaders as l', 'paddy_multi.data.loaders'),
    ('core.files', 'def f():\n    from ..data import loaders', 'paddy_multi.data.loaders'),  # not seen at import
    ('core.values', 'from .files import x', 'paddy_multi.core.files'),                  # a later notebook of the room
    ('core.values', 'from .values import x', 'paddy_multi.core.values'),                # itself
    ('core.values', 'from ..all import *', 'paddy_multi.all'),
    ('core.values', 'from .. import settings', 'paddy_multi'),
    ('core.values', 'from paddy_multi.data import *', 'paddy_multi.data'),
    ('core.values', 'from collab_deep.models.dot import x', 'collab_deep.models.dot')])
def test_imports_that_climb_are_found(module, source, found):
    line = len(source.splitlines())
    assert rules.climbing(source, f'paddy_multi.{module}', HOUSE) == [f'paddy_multi.{module}:{line} imports {found}']


@pytest.mark.parametrize('module, source', [
    ('paddy_multi.data.loaders', 'from ..core import files\nfrom ..core.values import x'),
    ('paddy_multi.data.loaders', 'import paddy_multi.core.files, re'),
    ('paddy_multi.data.loaders', 'from .. import __version__'),
    ('paddy_multi.core.files', 'from .values import x\nimport paddy_multi.core as room'),
    ('collab_deep.models.dot', 'from paddy_multi.core.values import x')])
def test_imports_that_go_down_are_fine(module, source):
    assert rules.climbing(source, module, HOUSE) == []


def test_the_other_package_offers_its_lowest_room_alone():
    found = rules.climbing('from paddy_multi.data.loaders import x', 'collab_deep.models.dot', HOUSE)
    assert found == ['collab_deep.models.dot:1 imports paddy_multi.data.loaders']


@pytest.mark.parametrize('source, found', [
    ('from ..core.values import _x', 'imports paddy_multi.core.values._x'),
    ('from ..core.values import x, _x as x2', 'imports paddy_multi.core.values._x'),
    ('from ..core import values\nvalues._x()', 'uses values._x'),
    ('import paddy_multi.core.values as v\nprint(v._x.y)', 'uses v._x'),
    ('import paddy_multi.core.values\nprint(paddy_multi.core.values._x)', 'uses paddy_multi.core.values._x'),
    ('def f():\n    from ..core import values as v\n    v._x = 1', 'uses v._x')])
def test_private_names_that_leave_are_found(source, found):
    line = len(source.splitlines())
    assert rules.prying(source, 'paddy_multi.data.loaders', HOUSE) == [f'paddy_multi.data.loaders:{line} {found}']


@pytest.mark.parametrize('source', ['from .. import __version__', '_x = 1\nself._x = _x', 'from torch import _C',
                                    'from ..core import values\nvalues.__doc__, values.x._y'])
def test_private_names_of_ones_own_are_fine(source):
    assert rules.prying(source, 'paddy_multi.data.loaders', HOUSE) == []


def test_wide_lines_are_found():
    assert rules.wide('a\n' + 'b'*121, 120) == ['line 2: 121 characters'] and rules.wide('b'*120, 120) == []
    assert rules.wide(f'__all__ = [{"b"*121}]', 120) == []


def test_what_readers_see():
    assert rules.is_read('x = 1') and rules.is_read('#| slow\nx = 1') and rules.is_read('hide = 1')
    assert not any(rules.is_read(f'#| {o}\nx = 1') for o in ('export', 'exporti', 'hide', 'echo: false'))


f, g, private = (f'#| export\ndef {name}(): pass' for name in ('f', 'g', '_p'))


@pytest.mark.parametrize('cells, found', [
    ([f, 'assert f()', g, 'f()'], [('f', 1), ('g', 1)]),
    ([f, g, 'assert f() == g()'], [('f', 2), ('g', 1)]),                      # two that belong together
    ([f, 'x = f()', 'x'], [('f', 2)]),                                        # prepared first
    ([f, g, private, 'assert f() == g()'], [('f', None), ('g', 2)]),          # three
    ([f], [('f', None)]), ([f, 'x = 1', 'import re'], [('f', None)]), ([private], []),
    ([f, '#| hide\nimport nbdev; nbdev.nbdev_export()'], [('f', None)]),
    (['#| export\n@patch\ndef fit(self:A): pass', '!ls'], [('fit', 1)])])
def test_exports_without_a_check_are_found(cells, found):
    assert rules.checks_after(cells) == found


def test_lines_of_code():
    assert rules.lines_of_code('#| export\n\ndef f():\n    return 1\n') == 2
    assert rules.public_definitions('x = 1\ndef f(): pass\nclass _A: pass\nclass B: pass') == ['f', 'B']


@pytest.mark.parametrize('cells, found', [
    (['from fastcore.test import *', OURS, 'test_close(1, 1)'], True),
    ([OURS, 'from fastai.vision.all import *', 'test_close(1, 1)'], False),
    (['from fastcore.test import *', 'test_close(1, 1)'], False),
    (['from fastcore.test import *', 'test_eq(1, 1)'], True)])
def test_checks_that_do_not_compare_lengths_are_found(cells, found): assert rules.compares_lengths(cells) == found


IGNORED = "warnings.simplefilter('ignore')"


@pytest.mark.parametrize('cell, found', [
    (IGNORED, 1), (f'x = 1\nimport warnings; {IGNORED}', 1), ('warnings.filterwarnings("ignore")', 1),
    ("warnings.filterwarnings('ignore', category=UserWarning)", 1),
    ("warnings.filterwarnings('ignore', category=FutureWarning)", 0),
    ("warnings.filterwarnings('ignore', message='.*torch')", 0),
    (f'with warnings.catch_warnings():\n    {IGNORED}\n    f()', 0)])
def test_filters_that_outlive_their_notebook_are_found(cell, found): assert len(rules.silences([cell])) == found
