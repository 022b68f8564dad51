"""Another device than the CPU, for machines without a GPU: `pytest --second-device`.

It holds its numbers in CPU memory and has the CPU compute them, but refuses what a GPU refuses: tensors of two devices
in one operation, and arrays of what has not been brought back. Needs a C++ compiler. fastai's default device is then
this one.
"""
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType

import torch

NAME = 'second'

class Module(ModuleType):
    "What torch asks of a device's module"
    def is_available(self): return True
    def is_initialized(self): return True
    def device_count(self): return 1
    def current_device(self): return 0
    def set_device(self, device): pass
    def device(self, device): return nullcontext()
    def synchronize(self, device=None): pass
    def _is_in_bad_fork(self): return False
    def _lazy_init(self): pass
    def manual_seed_all(self, seed): pass
    def get_amp_supported_dtype(self): return [torch.float16, torch.bfloat16]
    def get_rng_state(self, device=None): return torch.get_rng_state()
    def set_rng_state(self, state, device=None): pass

def start(build):
    "Build the device (half a minute, once) and make it torch's; then fastai's default"
    from torch.utils.cpp_extension import load
    build.mkdir(parents=True, exist_ok=True)
    load('second_device_memory', [str(Path(__file__).with_suffix('.cpp'))], build_directory=str(build),
         extra_cflags=['-O0'], with_cuda=False)
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, Module(f'torch.{NAME}'))
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    stay_themselves()
    be_default()

def stay_themselves():
    "A parameter that moves stays the same object, as on a GPU; where nothing has to move, nothing does"
    old, move = torch.nn.Module.to, torch.nn.Module._apply
    def to(self, *args, **kwargs):
        device, dtype, _, form = torch._C._nn._parse_to(*args, **kwargs)
        there = device is None or all(o.device.type == device.type for o in (*self.parameters(), *self.buffers()))
        return self if there and dtype is None and form is None else old(self, *args, **kwargs)
    def _apply(self, *args, **kwargs):
        with swapping(): return move(self, *args, **kwargs)
    torch.nn.Module.to, torch.nn.Module._apply = to, _apply

@contextmanager
def swapping():
    "Only here: `load_state_dict` would swap too, where on a GPU it copies, and fails while a graph holds a parameter"
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try: yield
    finally: torch.__future__.set_swap_module_params_on_conversion(before)

def be_default():
    "fastai's `default_device`, in every module that has it"
    import fastai.torch_core as core
    old = core.default_device
    def default_device(use=-1):
        if use == -1: use = core.defaults.use_cuda
        else: core.defaults.use_cuda = use
        return torch.device('cpu') if use is False else torch.device(NAME, 0)
    for m in list(sys.modules.values()):
        if getattr(m, 'default_device', None) is old: m.default_device = default_device
