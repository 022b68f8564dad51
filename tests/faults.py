"A disk that fails, or a process that is killed, at each operation of a piece of code in turn"
import builtins
import errno
import io
import os
import re
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch

TORCH = '[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534'  # what torch says on a full disk
HOW = ['once', 'stays', 'kill']


class Disk:
    """Inside the block, notes in `done` what is written below `folder`: opened, written, synced, moved, linked, made

    Operation number `at` fails as on a full disk: it alone (`how='once'`), it and all that follow (`'stays'`), or the
    process ends there (`'kill'`). Writes are those that reach the system, not those into a buffer."""
    def __init__(self, folder, at=None, how='once'):
        self.folder, self.at, self.how, self.done = Path(folder).resolve(), at, how, []

    def step(self, name, *paths, error=None):
        if not any(self.folder in (path, *path.parents) for path in map(path_of, paths)): return
        number = len(self.done)
        self.done.append(f'{name} {path_of(paths[-1]).relative_to(self.folder)}')
        if self.at is None or number < self.at or (self.how == 'once' and number > self.at): return
        if self.how == 'kill': os._exit(9)
        named = [os.fspath(o) for o in paths if not isinstance(o, int)]  # as the system says it, not of a write or sync
        raise error or OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *named[:1])

    def __enter__(self):
        self.stack = ExitStack()
        for name in ('fsync', 'write', 'pwrite', 'sendfile', 'ftruncate', 'mkdir', 'replace', 'rename', 'link'):
            self.stack.enter_context(patch.object(os, name, self.counted(name, getattr(os, name))))
        self.stack.enter_context(patch.object(os, 'open', self.os_open(os.open)))
        for module in (builtins, io):
            self.stack.enter_context(patch.object(module, 'open', self.io_open(io.open)))
        writer = torch._C.PyTorchFileWriter
        self.stack.enter_context(patch.object(torch._C, 'PyTorchFileWriter', lambda *a: TorchWriter(self, writer, *a)))
        return self

    def __exit__(self, *error): self.stack.close()

    def counted(self, name, call):
        def operation(*args, **kwargs):
            self.step(name, *args[:2 if name in ('replace', 'rename', 'link') else 1])
            return call(*args, **kwargs)
        return operation

    def os_open(self, call):
        def operation(path, flags, *args, **kwargs):
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT): self.step('open', path)
            return call(path, flags, *args, **kwargs)
        return operation

    def io_open(self, call):
        class Raw(io.FileIO):
            def write(raw, data):
                self.step('write', raw.fileno())
                return super().write(data)

        def operation(file, mode='r', buffering=-1, encoding=None, errors=None, newline=None, *more, **kwargs):
            if not set(mode) & {*'wax+'}: return call(file, mode, buffering, encoding, errors, newline, *more, **kwargs)
            self.step('open', file)
            raw = Raw(file, mode.replace('b', '').replace('t', ''), *more, **kwargs)
            if buffering == 0: return raw
            binary = (io.BufferedRandom if '+' in mode else io.BufferedWriter)(raw)
            if 'b' in mode: return binary
            text = io.TextIOWrapper(binary, encoding, errors, newline, line_buffering=buffering == 1)
            text.mode = mode
            return text
        return operation


class TorchWriter:
    "torch's writer, which writes by itself, and raises errors of its own"
    def __init__(self, disk, writer, target, *args):
        self.disk, self.target = disk, target if isinstance(target, str) else None
        self.step('open', RuntimeError('[enforce fail at inline_container.cc:747] . open file failed with strerror: '))
        self.writer = writer(target, *args)

    def step(self, name, error=None):  # what is written to an open file is counted there
        if self.target: self.disk.step(f'torch {name}', self.target, error=error or RuntimeError(TORCH))

    def __getattr__(self, name):
        if name in ('write_record', 'write_end_of_file'): self.step(name)
        return getattr(self.writer, name)


def path_of(path):
    "Where a path, or the number of an open file, lies"
    return Path(os.readlink(f'/proc/self/fd/{path}') if isinstance(path, int) else os.fsdecode(path)).resolve()


def operations(run, folder):
    "What `run` does below `folder`, operation by operation"
    with Disk(folder) as disk: run()
    return disk.done


def unlike(done):
    "Numbers of the operations in `done` that are unlike the one before or after: the first and last of many alike"
    kinds = ['', *(re.sub(r'\w{8}\.part', 'part', o) for o in done), '']
    return [i - 1 for i in range(1, len(done) + 1) if not kinds[i - 1] == kinds[i] == kinds[i + 1]]


def killed(run, folder, at):
    "Run in a process of its own, which ends at operation `at`; whether it came so far"
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # those of the parent are not there after a fork, and would be waited for
            with Disk(folder, at, 'kill'): run()
        finally: os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def contents(folder):
    "Text or bytes of each file below `folder`, by its path in it"
    return {o.relative_to(folder).as_posix(): o.read_bytes() for o in Path(folder).rglob('*') if o.is_file()}
