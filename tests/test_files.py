"Files and locks among several processes and threads"
import errno
import multiprocessing
import os
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from paddy_multi.core.files import locked, write_file, written_together

IN = '''
import sys, time
from paddy_multi.core.files import locked
with locked(sys.argv[1]):
    print('in', flush=True)
    time.sleep(60)
'''
fork = multiprocessing.get_context('fork')


@pytest.fixture
def holder(tmp_path):
    "A process that is in the folder"
    process = subprocess.Popen([sys.executable, '-c', IN, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'in\n'
    yield process
    process.kill()
    process.communicate()


def enter(folder, wait=0):
    with locked(folder, wait): return 'in'


# --- writing at the same time ---------------------------------------------------------------------------------------
def write_often(file, letter, barrier):
    barrier.wait()
    for _ in range(20): write_file(file, letter*100_000)


@pytest.mark.filterwarnings('error::pytest.PytestUnhandledThreadExceptionWarning')
@pytest.mark.parametrize('many, barrier', [(threading.Thread, threading.Barrier), (fork.Process, fork.Barrier)],
                         ids=['threads', 'processes'])
def test_several_write_one_file(tmp_path, many, barrier):
    file, barrier = tmp_path/'a.txt', barrier(9)
    writers = [many(target=write_often, args=(file, o, barrier)) for o in 'abcdefgh']
    for o in writers: o.start()
    barrier.wait()
    seen = set()
    while any(o.is_alive() for o in writers):
        if file.exists(): seen.add(file.read_text())
    for o in writers: o.join()
    assert all(getattr(o, 'exitcode', 0) == 0 for o in writers)
    assert len(seen) > 1 and all(len(o) == 100_000 and len({*o}) == 1 for o in seen)
    assert [o.name for o in tmp_path.iterdir()] == ['a.txt']

def test_names_may_be_as_long_as_the_disk_allows(tmp_path):
    for name in ('n'*255, 'ñ'*127, '米'*85, '[*?].csv'): assert write_file(tmp_path/name, 'x').read_text() == 'x'
    assert len([*tmp_path.iterdir()]) == 4

def test_what_another_file_left_stays(tmp_path):
    ended = subprocess.Popen([sys.executable, '-c', ''])
    ended.wait()
    for o in ('b.csv', 'a.csv.bak'): (tmp_path/f'{o}.{platform.node()}.{ended.pid}.x.part').touch()
    write_file(tmp_path/'a.csv', '1')
    assert len([*tmp_path.glob('*.part')]) == 2


# --- one at a time --------------------------------------------------------------------------------------------------
def test_a_second_process_is_told_who_is_in(tmp_path, holder):
    with pytest.raises(BlockingIOError) as e: enter(tmp_path)
    assert str(e.value) == (f'{tmp_path} is in use by process {holder.pid} on {platform.node()}: '
                            'wait until it ends, or choose another folder')

def test_the_lock_of_a_killed_process_counts_for_nothing(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert (tmp_path/'.lock').read_text() == f'{holder.pid} {platform.node()}\n'
    assert enter(tmp_path) == 'in' and not (tmp_path/'.lock').exists()

def test_a_number_that_is_another_processes_by_now_counts_for_nothing(tmp_path):
    (tmp_path/'.lock').write_text(f'{os.getppid()} {platform.node()}\n')
    assert enter(tmp_path) == 'in'

def test_the_lock_of_another_machine_is_left_to_people(tmp_path):
    (tmp_path/'.lock').write_text('12 far-away\n')
    with pytest.raises(BlockingIOError, match='in use by process 12 on far-away, and from .* it cannot be seen whether '
                                              r'that still runs: wait for it, or remove .*/\.lock if it has ended'):
        enter(tmp_path)
    (tmp_path/'.lock').unlink()
    assert enter(tmp_path) == 'in'

def test_waiting_ends_when_the_other_does(tmp_path, holder):
    with ThreadPoolExecutor() as pool:
        waits = pool.submit(enter, tmp_path, 60)
        with pytest.raises(BlockingIOError): enter(tmp_path, .1)
        assert not waits.done()
        holder.kill()
        assert waits.result() == 'in'

def test_an_error_inside_opens_the_folder_again(tmp_path):
    with pytest.raises(KeyboardInterrupt), locked(tmp_path): raise KeyboardInterrupt
    assert enter(tmp_path) == 'in' and not [*tmp_path.iterdir()]

def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match='none'): enter(tmp_path/'none')

def test_a_disk_without_locks_asks_whether_the_process_runs(tmp_path, monkeypatch, holder):
    def none(*args): raise OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr('fcntl.flock', none)
    with pytest.raises(BlockingIOError, match=f'in use by process {holder.pid} on '): enter(tmp_path)
    holder.kill()
    holder.wait()
    assert enter(tmp_path) == 'in'

def test_a_lock_that_was_removed_in_the_meantime_is_none(tmp_path, monkeypatch):
    "Its holder left between our opening the file and locking it: others would lock a new one beside us"
    calls = []
    def flock(opened, how):
        calls.append(opened)
        if len(calls) == 1: (tmp_path/'.lock').unlink()
    monkeypatch.setattr('fcntl.flock', flock)
    with locked(tmp_path): assert (tmp_path/'.lock').exists()
    assert len(calls) == 2

def test_no_file_stays_open(tmp_path):
    before = len(os.listdir('/proc/self/fd'))
    for _ in range(5):
        with locked(tmp_path), pytest.raises(BlockingIOError): enter(tmp_path)
        write_file(tmp_path/'a', 'a')
    assert len(os.listdir('/proc/self/fd')) == before

def enter_often(folder, inside, barrier, overlaps):
    barrier.wait()
    for _ in range(10):
        with locked(folder, 60):
            if inside.value: overlaps.value += 1
            inside.value += 1
            time.sleep(.001)
            inside.value -= 1

def test_never_two_at_once(tmp_path):
    "Eight processes take turns, beginning with a lock that a dead one has left"
    (tmp_path/'.lock').write_text(f'{os.getppid()} {platform.node()}\n')
    inside, overlaps, barrier = fork.Value('i', 0, lock=False), fork.Value('i', 0, lock=False), fork.Barrier(8)
    all_of_them = [fork.Process(target=enter_often, args=(tmp_path, inside, barrier, overlaps)) for _ in range(8)]
    for o in all_of_them: o.start()
    for o in all_of_them: o.join()
    assert [o.exitcode for o in all_of_them] == [0]*8 and overlaps.value == 0
    assert not [*tmp_path.iterdir()]


# --- several files --------------------------------------------------------------------------------------------------
def test_together_syncs_all_before_it_moves_any(tmp_path, monkeypatch):
    done = []
    def note(name, call):
        def noted(*args):
            path = os.readlink(f'/proc/self/fd/{args[0]}') if name == 'fsync' else args[1]
            done.append((name, Path(path).name))
            return call(*args)
        monkeypatch.setattr(os, name, noted)
    for name in ('fsync', 'replace'): note(name, getattr(os, name))
    with written_together(tmp_path, ['a', 'b']) as new:
        for o in 'ab': (new/o).write_text(o)
    part = next(o for _, o in done if o.endswith('.part'))
    assert done == [('fsync', 'a'), ('fsync', 'b'), ('fsync', 'new'), ('fsync', part), ('replace', '.moving'),
                    ('fsync', tmp_path.name), ('replace', 'a'), ('replace', 'b'), ('fsync', tmp_path.name),
                    ('fsync', tmp_path.parent.name)]

def test_what_a_killed_process_had_ready_is_moved_before_anything_else(tmp_path):
    (tmp_path/'.moving'/'new').mkdir(parents=True)
    (tmp_path/'.moving'/'new'/'b').write_text('new')
    with written_together(tmp_path, ['a']) as new:
        assert (tmp_path/'b').read_text() == 'new' and not (tmp_path/'.moving').exists()
        (new/'a').write_text('a')

@pytest.mark.parametrize('error', [ValueError('a bug'), KeyboardInterrupt()])
def test_an_error_of_another_kind_leaves_all_as_it_was(tmp_path, error):
    (tmp_path/'a').write_text('old')
    with pytest.raises(type(error)), written_together(tmp_path, ['a']) as new:
        (new/'a').write_text('new')
        raise error
    assert [(o.name, o.read_text()) for o in tmp_path.iterdir()] == [('a', 'old')]
