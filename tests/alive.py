"Bytes of tensors that are alive, counted by themselves, without the package"
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Storages that were made inside the block and are alive: `now`, and the `most` since that was last set

    In bytes, each rounded up to a multiple of `block`, as an allocator does"""
    def __init__(self, *tensors, block=1):
        super().__init__()
        self.now, self.most, self.block, self.seen = 0, 0, block, {}
        self.add(tensors)

    def add(self, o):
        for t in tree_leaves(o):
            if not isinstance(t, torch.Tensor): continue
            storage = t.untyped_storage()
            if storage._cdata in self.seen: continue
            self.seen[storage._cdata] = size = -(-storage.nbytes()//self.block)*self.block
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.gone, storage._cdata)

    def gone(self, key): self.now -= self.seen.pop(key, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.add(out)
        return out
