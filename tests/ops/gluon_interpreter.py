"""Run kernels on the CPU in float64, program by program, also those in Gluon, which Triton's interpreter cannot run.

The kernel's own code runs, on tensors in place of Gluon's; layouts, which decide only where a value is, are ignored.
Reads and writes are checked to be inside of their tensors. Shared memory is NaN until a copy was waited for, and
asynchronous products read it when they start and when they are waited for, as early and as late as a GPU may.
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
        if shape[-1] == self.values.shape[-1]:
            return Shared(self.values.view(shape))
        width = self.values.shape[-1]
        return Tiles(self.values.view(*shape[:-2], shape[-1] // width, shape[-2], width))

    _reinterpret = reinterpret

    @property
    def dtype(self):
        return self.values.dtype

    def load(self, layout=None):
        return self.values.clone()

    def store(self, values):
        self.values.copy_(values)


@dataclass
class Tiles(Shared):
    """Matrices wider than the swizzled rows of their layout, in memory one block of columns after the other."""
    is_transposed: bool = False

    def index(self, i):
        return Tiles(self.values[int(i)])

    def slice(self, start, length, dim):
        assert dim == 0 and not self.is_transposed
        return Tiles(self.values[:, start:start + length])

    def permute(self, order):
        assert order == (1, 0)
        return Tiles(self.values, not self.is_transposed)

    def load(self, layout=None):
        matrix = self.values.movedim(0, 1).flatten(1)
        return matrix.T if self.is_transposed else matrix


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


class Product:
    """Asynchronous product, added to a sum that may be another one. NaN where an operand changes before its end."""

    def __init__(self, a, b, acc):
        self.operands, self.acc, self.result = (a, b), acc, None
        self.at_start = self._read()

    def _read(self):
        return [each.load().clone() if isinstance(each, Shared) else each for each in self.operands]

    def compute(self):
        a, b = (torch.where(old == new, new, math.nan) for old, new in zip(self.at_start, self._read()))
        self.result = (self.acc.result if isinstance(self.acc, Product) else self.acc) + a @ b
        self.operands = self.at_start = self.acc = None


@dataclass
class Products:
    """Asynchronous products in the order of their start."""
    started: list = field(default_factory=list)

    def start(self, a, b, acc, is_async):
        self.started.append(Product(a, b, acc))
        return self.started[-1]

    def wait(self, outstanding, deps):
        while len(self.started) > outstanding:
            self.started.pop(0).compute()
        found = tuple(each.result if getattr(each, 'result', None) is not None else each for each in deps)
        return found if len(found) > 1 else found[0]


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


def run(launched):
    """Run a recorded launch, whose tensors are on the CPU and of float64."""
    kernel = launched.kernel
    arguments = {
        name: Pointer.to(value) if isinstance(value, torch.Tensor) else torch.tensor(value) if type(value) is int
        and not param.is_constexpr else value
        for param in kernel.params for name, value in [(param.name, launched.arguments[param.name])]}
    for program in range(math.prod(launched.grid)):
        copies, products = Copies(), Products()
        names = dict(kernel.fn.__globals__)
        language = _language(program, torch.float64)
        names.update(
            gl=language, tl=language, async_copy=copies, _async_load=copies.async_load,
            _barrier=lambda: None, fence_async_shared=lambda: None,
            warpgroup_mma=products.start, warpgroup_mma_wait=products.wait,
            _copy_layout=lambda *args: None, _map_operand_layout=lambda *args: None)
        for name, value in kernel.fn.__globals__.items():
            if isinstance(value, JITFunction):
                names[name] = types.FunctionType(value.fn.__code__, names, None, value.fn.__defaults__)
        types.FunctionType(kernel.fn.__code__, names)(**arguments)
