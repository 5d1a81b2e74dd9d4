"""Run kernels on the CPU in float64, program by program, also those in Gluon, which Triton's interpreter cannot run.

The kernel's own code runs, on tensors in place of Gluon's; layouts, which decide only where a value is, are ignored.
Reads and writes are checked to be inside of their tensors. Shared memory is NaN until a copy was waited for, and
asynchronous products read it when they are waited for, as late as a GPU may.
"""
import math
import types
from dataclasses import dataclass, field

import torch
from triton.runtime.jit import JITFunction


@dataclass
class Pointer:
    memory: torch.Tensor        # one-dimensional
    offsets: object = 0

    @classmethod
    def to(cls, tensor):
        """Return the pointer of a tensor, to the end of its memory."""
        start = tensor.storage_offset()
        return cls(tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize - start,), (1,), start))

    @property
    def dtype(self):
        return types.SimpleNamespace(element_ty=self.memory.dtype)

    def __add__(self, offsets):
        return Pointer(self.memory, self.offsets + offsets)

    def _selected(self, mask):
        offsets = torch.as_tensor(self.offsets)
        mask = torch.ones_like(offsets, dtype=torch.bool) if mask is None else mask
        offsets, mask = torch.broadcast_tensors(offsets, mask)
        used = offsets[mask]
        assert used.numel() == 0 or 0 <= used.min() <= used.max() < self.memory.numel(), 'outside of a tensor'
        return offsets, mask

    def load(self, mask=None, other=0.):
        offsets, mask = self._selected(mask)
        return torch.where(mask, self.memory[torch.where(mask, offsets, 0)], other)

    def store(self, values, mask=None):
        offsets, mask = self._selected(mask)
        self.memory[offsets[mask]] = values.broadcast_to(offsets.shape)[mask]


@dataclass
class Shared:
    values: torch.Tensor

    def index(self, i):
        return Shared(self.values[int(i)])

    def permute(self, order):
        return Shared(self.values.permute(order))

    def reinterpret(self, dtype, shape, layout):
        return Shared(self.values.view(shape))

    _reinterpret = reinterpret

    def load(self, layout=None):
        return self.values.clone()

    def store(self, values):
        self.values.copy_(values)


@dataclass
class Copies:
    """Asynchronous copies to shared memory, by group."""
    groups: list = field(default_factory=lambda: [[]])

    def async_load(self, shared, pointer, mask=None):
        shared.values.fill_(math.nan)
        self.groups[-1].append((shared, pointer, mask))

    def commit_group(self):
        self.groups.append([])

    def wait_group(self, outstanding):
        ready, self.groups = self.groups[:-1 - outstanding], self.groups[-1 - outstanding:]
        for shared, pointer, mask in (copy for group in ready for copy in group):
            shared.values.copy_(pointer.load(mask))


@dataclass
class Product:
    """Asynchronous product, added to a sum that may be another one."""
    a: object
    b: Shared
    acc: object

    def value(self):
        a, acc = (each.value() if isinstance(each, Product) else each for each in (self.a, self.acc))
        return acc + (a.values if isinstance(a, Shared) else a) @ self.b.values


def _language(program, dtype):
    def ignored(*args, **kwargs):
        return None

    return types.SimpleNamespace(
        program_id=lambda axis: torch.tensor(program), static_range=range, int64=torch.int64, float32=dtype,
        arange=lambda start, end, layout=None: torch.arange(start, end),
        zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
        cdiv=lambda a, b: -(-a // b), where=lambda condition, a, b: torch.where(
            torch.as_tensor(condition), torch.as_tensor(a), torch.as_tensor(b)),
        maximum=lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
        minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
        sum=lambda values, axis: values.sum(axis),
        gather=lambda values, index, axis: values.gather(axis, index),
        load=lambda pointer, mask=None, other=0.: pointer.load(mask, other),
        store=lambda pointer, values, mask=None: pointer.store(values, mask),
        convert_layout=lambda values, layout, assert_trivial=False: values,
        allocate_shared_memory=lambda dtype, shape, layout: Shared(torch.full(shape, math.nan, dtype=dtype)),
        SliceLayout=ignored, DotOperandLayout=ignored, BlockedLayout=ignored, NVMMADistributedLayout=ignored,
        NVMMASharedLayout=ignored, SwizzledSharedLayout=ignored,
    )


def _wait(outstanding, deps):
    assert outstanding == 0
    return tuple(each.value() if isinstance(each, Product) else each for each in deps)


def run(launched):
    """Run a recorded launch, whose tensors are on the CPU and of float64."""
    kernel = launched.kernel
    arguments = {
        name: Pointer.to(value) if isinstance(value, torch.Tensor) else torch.tensor(value) if type(value) is int
        and not param.is_constexpr else value
        for param in kernel.params for name, value in [(param.name, launched.arguments[param.name])]}
    for program in range(math.prod(launched.grid)):
        copies = Copies()
        names = dict(kernel.fn.__globals__)
        language = _language(program, torch.float64)
        names.update(
            gl=language, tl=language, async_copy=copies, _async_load=copies.async_load,
            _barrier=lambda: None, fence_async_shared=lambda: None,
            warpgroup_mma=lambda a, b, acc, is_async: Product(a, b, acc), warpgroup_mma_wait=_wait,
            _copy_layout=lambda *args: None, _map_operand_layout=lambda *args: None)
        for name, value in kernel.fn.__globals__.items():
            if isinstance(value, JITFunction):
                names[name] = types.FunctionType(value.fn.__code__, names)
        types.FunctionType(kernel.fn.__code__, names)(**arguments)
