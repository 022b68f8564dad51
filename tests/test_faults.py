"An error of the disk, or a kill, at every operation: what was there before stays, or what is new is there, whole"
import shutil
import subprocess
import sys

import pytest
import torch

from faults import HOW, Disk, contents, killed, operations
from paddy_multi.core.files import locked, write_file, written_together, written_whole

OLD = {'a.csv': b'old', 'b.pth': b'old weights', 'mine.txt': b'kept'}


@pytest.fixture
def folder(tmp_path): return tmp_path/'out'


def begin(folder):
    "A new folder with old results"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in OLD.items(): (folder/name).write_bytes(data)


def fails(save, folder, at, how):
    "The text of the error of `save`, whose operation `at` fails; where its process is killed, True"
    if how == 'kill': return killed(lambda: save(folder), folder.parent, at) or pytest.fail('it was not killed')
    with pytest.raises(OSError) as e, Disk(folder.parent, at, how): save(folder)
    return str(e.value)


# --- one file -------------------------------------------------------------------------------------------------------
def save_text(folder): write_file(folder/'a.csv', 'new')

def save_lines(folder):
    with written_whole(folder/'a.csv') as part, part.open('w', encoding='utf-8') as f:
        f.write('ne')
        f.flush()
        f.write('w')

def save_tensors(folder):
    with written_whole(folder/'b.pth') as part: torch.save(dict(a=torch.ones(3)), part)


@pytest.mark.parametrize('how', HOW)
@pytest.mark.parametrize('save, name, n', [(save_text, 'a.csv', 5), (save_lines, 'a.csv', 6),
                                           (save_tensors, 'b.pth', 9)])
def test_a_file_is_old_or_new_after_a_fault_at_any_operation(folder, save, name, n, how):
    begin(folder)
    done = operations(lambda: save(folder), folder.parent)
    moved = next(i for i, o in enumerate(done) if o.startswith('replace'))
    assert len(done) >= n, done

    def is_new():
        if (folder/name).read_bytes() == OLD[name]: return False
        assert torch.load(folder/name)['a'].sum() == 3 if save is save_tensors else (folder/name).read_text() == 'new'
        return True
    assert is_new()
    for at, operation in enumerate(done):
        begin(folder)
        said = fails(save, folder, at, how)
        if how != 'kill':
            assert said.endswith(f": '{folder/name}'"), (operation, said)
            assert {*contents(folder)} == {*OLD}, 'nothing else is left'
        assert is_new() == (at > moved), operation
        save(folder)
        assert is_new() and {*contents(folder)} == {*OLD}, operation


# --- several together -----------------------------------------------------------------------------------------------
NEW = {'a.csv': b'new', 'b.pth': b'new weights', 'c.html': b'new page'}

def save_together(folder):
    with locked(folder), written_together(folder, list(NEW)) as new:
        for name, data in NEW.items(): (new/name).write_bytes(data)


@pytest.mark.parametrize('link', [True, False], ids=['links', 'copies'])
@pytest.mark.parametrize('how', HOW)
def test_several_files_are_old_or_new_together(folder, how, link, monkeypatch):
    if not link: monkeypatch.setattr('os.link', no_links)
    begin(folder)
    done = operations(lambda: save_together(folder), folder.parent)
    assert contents(folder) == OLD | NEW and len(done) >= 25, done
    for at, operation in enumerate(done):
        begin(folder)
        if how == 'once' and operation.startswith('link'):  # then it is copied
            with Disk(folder.parent, at): save_together(folder)
            assert contents(folder) == OLD | NEW
            continue
        said = fails(save_together, folder, at, how)
        if how == 'once':  # nothing needs to be mended, and nothing else is left
            assert f"'{folder}" in said, (operation, said)
            assert contents(folder) in (OLD, OLD | NEW), operation
        with locked(folder): after = contents(folder)
        after.pop('.lock')
        if how != 'once': after = {k: v for k, v in after.items() if '.part' not in k}
        assert after in (OLD, OLD | NEW), (operation, after)
        save_together(folder)
        assert contents(folder) == OLD | NEW, operation

def no_links(file, new): raise OSError('this disk has no links')


# --- a size limit, which is real ------------------------------------------------------------------------------------
LIMITED = '''
import os, resource, signal, sys, torch
from paddy_multi.core.files import locked, write_file, written_together, written_whole
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = sys.argv[1]
def limited(size, save):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try: save()
    except Exception as e: return type(e).__name__ + ' ' + str(e)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
def weights():
    with written_whole(f'{folder}/b.pth') as part: torch.save(torch.zeros(10000), part)
def together():
    with locked(folder), written_together(folder, ['a.csv', 'b.pth']) as new:
        (new/'a.csv').write_text('new')
        torch.save(torch.zeros(10000), new/'b.pth')
print(limited(1000, lambda: write_file(f'{folder}/a.csv', b'x'*1001)))
for size in (0, 100, 1000, 40000, 41000): print(limited(size, weights), limited(size, together), sep='\\n')
'''

def test_a_limit_of_file_sizes_leaves_what_was_there(folder):
    begin(folder)
    done = subprocess.run([sys.executable, '-c', LIMITED, folder], capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert len(said) == 11 and done.stderr == '', done
    assert said[0] == f"OSError [Errno 27] File too large: '{folder/'a.csv'}'"
    assert all(o.startswith('OSError [Errno ') and f"'{folder}" in o for o in said), said
    assert contents(folder) == OLD
