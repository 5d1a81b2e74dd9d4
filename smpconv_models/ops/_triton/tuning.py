"""Tiles: how much of the problem one program takes, within what the device has.

Tuned tiles are data in configs/; other problems get a default. One that takes too much is made smaller.

``configs/sm_NN.json`` is a list of ``{kernel, mode, batch, height, width, kernel_size, tile, source}``; ``mode`` is the
precision of the products. A tuned tile serves the GPUs of its compute capability, and every batch from half of the one
that it was tuned for.
"""
import functools
import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

from torch import Tensor

from .._backends import LaunchError
from .limits import Limits, _capability, _limits

_CONFIGS = Path(__file__).parent / 'configs'

# Above this size, gathering a whole map's kernel costs more instructions than the block form takes.
_LARGEST_FORWARD_MAP = 64
# Above this size it is no substitute for the block form either: its products grow with the square of the map.
_LARGEST_OTHER_FORWARD_MAP = 256
# Above these sizes, a column of the whole map's product is too much for one program.
_LARGEST_GRAD_MAP, _WIDEST_GRAD_MAP = 256, 16
# A row of a 51x51 kernel has 5 chunks. Compiling takes as long as the unrolled loop.
_MOST_UNROLLED = 5


class Step(NamedTuple):
    """Iteration of a loop: a number of products of M x K by K x N."""
    m: int
    n: int
    k: int
    products: int = 1


class _Program(ABC):
    """Resources that a tile's program takes, at most: tests compare them with builds."""
    num_warps: int
    num_stages: int

    @abstractmethod
    def step(self, width: int, kernel_width: int) -> Step:
        """Return the products of one iteration of the loop."""

    @abstractmethod
    def smaller(self) -> Optional['Tile']:
        """Return a tile that takes less, at the least cost, or None."""

    def shared_memory(self, limits: Limits, element_size: int, width: int, kernel_width: int) -> int:
        """Return the bytes of the operands in flight and their barriers, or of the sums after the loop."""
        m, n, k, products = self.step(width, kernel_width)
        buffers = max(self.num_stages - (not limits.reads_shared), 1)
        return max(products * (buffers * (m + n) * k * element_size + 16), 4 * m * n)

    def fits(self, limits: Limits, element_size: int, width: int, kernel_width: int) -> bool:
        m, n, _, products = self.step(width, kernel_width)
        # half of the registers hold the sums, the others operands, addresses and masks
        registers = min(limits.registers, 256 * 32 * self.num_warps)
        # each product has its own sums there, 128 rows to a column
        columns = products * n * -(-m // 128)
        return (
            self.shared_memory(limits, element_size, width, kernel_width) <= limits.shared_memory
            and 2 * m * n <= registers
            and (limits.tensor_memory is None or columns <= limits.tensor_memory))


@dataclass(frozen=True)
class MapTile(_Program):
    """Images, input pixels and output pixels of a step."""
    bn: int
    bi: int
    bo: int
    num_warps: int = 4
    num_stages: int = 3

    @classmethod
    def default(cls, n: int, h: int, w: int, kernel_size: Sequence[int], precision: str) -> 'MapTile':
        most = 32 if precision == 'ieee' else 64
        return cls(bn=_between(16, n, most), bi=16, bo=_between(16, h * w, 2 * most))

    def step(self, width: int, kernel_width: int) -> Step:
        return Step(self.bn, self.bo, self.bi)

    def smaller(self) -> Optional['Tile']:
        return _reduced(self, num_stages=1, bo=16, bn=16)


@dataclass(frozen=True)
class MapGradTile(MapTile):
    """``bi`` holds the whole map, ``bo`` a row of it."""

    @classmethod
    def default(cls, n: int, h: int, w: int, kernel_size: Sequence[int], precision: str) -> 'MapGradTile':
        return cls(
            bn=_between(16, n, {'half': 64, 'tf32': 32, 'ieee': 16}[precision]), bo=16,
            bi=_between(16, _rotated(h, w), _LARGEST_GRAD_MAP), num_stages=1)

    def step(self, width: int, kernel_width: int) -> Step:
        return Step(self.bi, self.bo, self.bn)

    def shared_memory(self, limits: Limits, element_size: int, width: int, kernel_width: int) -> int:
        """Return the bytes of the operands and of the sums, which are rotated beside them."""
        return super().shared_memory(limits, element_size, width, kernel_width) + 4 * self.bi * self.bo

    def smaller(self) -> Optional['Tile']:
        return _reduced(self, num_stages=1, bn=16)


@dataclass(frozen=True)
class BlockTile(_Program):
    """Blocks of ``r`` rows and ``s`` columns, chunks of ``tc`` columns, ``bp`` blocks per program.

    ``unroll`` is the largest number of chunks in one step.
    """
    r: int
    s: int
    tc: int
    bp: int
    num_warps: int = 4
    num_stages: int = 3
    unroll: int = _MOST_UNROLLED

    @classmethod
    def default(cls, n: int, h: int, w: int, kernel_size: Sequence[int], precision: str) -> 'BlockTile':
        s = _block_width(h, w, precision)
        chunks = window(s, 16, w, kernel_size[1])[1]
        one_wide = precision == 'half' and window(s, 32, w, kernel_size[1])[1] == 1
        tc = 32 if s == 32 or one_wide or chunks > _MOST_UNROLLED else 16
        r = _between(1, h, 4 if precision == 'ieee' else 8)
        most = {'half': 128, 'tf32': 64, 'ieee': 32}[precision]
        bp = _between(16, n * -(-w // s), most if h == 1 else most * 16 // s)
        return cls(r=r, s=s, tc=tc, bp=bp, num_warps=8 if r * s * bp > 8192 else 4)

    def step(self, width: int, kernel_width: int) -> Step:
        return Step(self.r * self.s, self.bp, self.tc, self.unrolled(window(self.s, self.tc, width, kernel_width)[1]))

    def smaller(self) -> Optional['Tile']:
        return _reduced(self, unroll=1, num_stages=2, bp=16, r=1) or _reduced(self, num_stages=1)

    def unrolled(self, chunks: int) -> int:
        """Return the chunks of one step: as many as allowed that divide all."""
        return max(count for count in range(1, self.unroll + 1) if chunks % count == 0)


@dataclass(frozen=True)
class BlockGradTile(_Program):
    """Blocks of ``r`` rows and ``s`` columns against ``d`` rows and ``tc`` columns; ``bn * bj`` blocks per step."""
    r: int
    s: int
    d: int
    tc: int
    bn: int
    bj: int
    num_warps: int = 8
    num_stages: int = 3

    def __post_init__(self) -> None:
        assert self.r <= self.d and self.s <= self.tc, 'a diagonal wraps around the end at most once'

    @classmethod
    def default(cls, n: int, h: int, w: int, kernel_size: Sequence[int], precision: str) -> 'BlockGradTile':
        s = min(_block_width(h, w, precision), 32)
        d = 1 if h == 1 else {'half': 8, 'tf32': 8, 'ieee': 4}[precision] * 16 // s
        step = {'half': 64, 'tf32': 32, 'ieee': 16}[precision]
        bn = _between(1, n, step)
        num_warps = 4 if precision == 'ieee' or h == 1 else 8
        tc = 64 if h == 1 and precision != 'ieee' else s    # 64 rows of a product, which wgmma takes
        return cls(r=_between(1, h, d), s=s, d=d, tc=tc, bn=bn, bj=step // bn, num_warps=num_warps)

    def step(self, width: int, kernel_width: int) -> Step:
        return Step(self.d * self.tc, self.r * self.s, self.bn * self.bj)

    def smaller(self) -> Optional['Tile']:
        return _reduced(
            self, num_stages=1, bj=max(16 // self.bn, 1), bn=max(16 // self.bj, 1), r=1, d=self.r)

    def groups(self, kernel_height: int) -> int:
        """Return how many times ``d`` rows cover the input rows of a block."""
        return -(-(kernel_height + self.r - 1) // self.d)

    def splits(self, batch: int, width: int, programs: int) -> int:
        """Return in how many parts a sum is taken, so that a GPU has enough programs."""
        steps = -(-batch // self.bn) * -(-width // (self.s * self.bj))
        return max(1, min(steps, 256 // programs))


@dataclass(frozen=True)
class HopperTile(_Program):
    """All columns of ``bn`` images; each warp computes one of 8 output rows. A stage is an input row."""
    bn: int
    num_warps: int = 8
    num_stages: int = 4

    def __post_init__(self) -> None:
        assert self.num_warps == 8 and self.num_stages > 1, 'a warp for each row, and a row ahead'

    @classmethod
    def default(cls, n: int, h: int, w: int, kernel_size: Sequence[int], precision: str) -> 'HopperTile':
        return cls(bn=_between(16, n, 64))

    def step(self, width: int, kernel_width: int) -> Step:
        return Step(8 * 16, hopper_blocks(width) * self.bn, 16)

    def shared_memory(self, limits: Limits, element_size: int, width: int, kernel_width: int) -> int:
        """Return the bytes of the rows in flight; the weight is in registers."""
        _, n, k, _ = self.step(width, kernel_width)
        return self.num_stages * n * k * element_size

    def smaller(self) -> Optional['Tile']:
        return _reduced(self, num_stages=2, bn=16)


@dataclass(frozen=True)
class HopperGradTile(_Program):
    """``bn`` images of a channel in shared memory."""
    bn: int
    num_warps: int = 4
    num_stages: int = 1

    def __post_init__(self) -> None:
        assert self.num_warps == 4 and self.num_stages == 1, 'the kernel has one buffer, and products of 4 warps'

    @classmethod
    def default(cls, n: int, h: int, w: int, kernel_size: Sequence[int], precision: str) -> 'HopperGradTile':
        return cls(bn=_between(16, n, 32))      # 64 spill registers with Triton 3.9

    def step(self, width: int, kernel_width: int) -> Step:
        return Step(4 * 16, 16, self.bn)

    def shared_memory(self, limits: Limits, element_size: int, width: int, kernel_width: int) -> int:
        """Return the bytes of 16 rows of both operands."""
        return 2 * 16 * 16 * self.bn * element_size

    def smaller(self) -> Optional['Tile']:
        return _reduced(self, bn=16)


@dataclass(frozen=True)
class HopperMapTile(_Program):
    """``bn`` images, and a warp for each strip of the output."""
    bn: int
    num_warps: int
    num_stages: int = 1

    def __post_init__(self) -> None:
        assert self.num_warps in (4, 8) and self.num_stages == 1, 'products of 4 or 8 warps, and one buffer'

    @classmethod
    def default(cls, n: int, h: int, w: int, kernel_size: Sequence[int], precision: str) -> 'HopperMapTile':
        return cls(bn=_between(16, n, 64), num_warps=4 if strips(h, w) <= 4 else 8)

    def step(self, width: int, kernel_width: int) -> Step:
        return Step(self.num_warps * 16, self.bn, 16)

    def shared_memory(self, limits: Limits, element_size: int, width: int, kernel_width: int) -> int:
        """Return the bytes of 16 strips."""
        return 16 * 16 * self.bn * element_size

    def smaller(self) -> Optional['Tile']:
        return _reduced(self, bn=16)


@dataclass(frozen=True)
class HopperBlockGradTile(_Program):
    """``bn`` images of a channel. ``num_stages`` rows are copied ahead."""
    bn: int
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        assert self.num_warps == 4 and self.bn >= 16, 'products of 4 warps, and of 16 images'

    @classmethod
    def default(cls, n: int, h: int, w: int, kernel_size: Sequence[int], precision: str) -> 'HopperBlockGradTile':
        return cls(bn=16)

    def step(self, width: int, kernel_width: int) -> Step:
        return Step(4 * 16, 4 * 16, self.bn, 2 * (3 * hopper_blocks(width) - 2))

    def shared_memory(self, limits: Limits, element_size: int, width: int, kernel_width: int) -> int:
        """Return the bytes of the two rings of rows, four rows at each place."""
        row = hopper_blocks(width) * self.bn * 16 * element_size
        return ((self.num_stages + 2) + (self.num_stages + 18)) * 4 * row

    def smaller(self) -> Optional['Tile']:
        return _reduced(self, num_stages=1)


Tile = Union[
    MapTile, BlockTile, BlockGradTile, HopperTile, HopperMapTile, HopperGradTile, HopperBlockGradTile]
TILES: Dict[str, Any] = {
    'map_forward': MapTile, 'map_weight_grad': MapGradTile,
    'block_forward': BlockTile, 'block_weight_grad': BlockGradTile,
    'hopper_forward': HopperTile, 'hopper_map_weight_grad': HopperGradTile,
    'hopper_map_forward': HopperMapTile, 'hopper_block_weight_grad': HopperBlockGradTile,
    'hopper_small_map_weight_grad': HopperGradTile,
}
_DEFAULTS = {name: tile.default for name, tile in TILES.items()}


def _reduced(tile: Any, **least: int) -> Any:
    """Return the tile with the first of its numbers that is above the least one reduced, or None."""
    for name, smallest in least.items():
        number = getattr(tile, name)
        if number > smallest:
            return replace(tile, **{name: number - 1 if name == 'num_stages' else number // 2})
    return None


def window(s: int, tc: int, width: int, kernel_width: int) -> Tuple[int, int]:
    """Return how many input columns ``s`` output columns read before the first, and in how many chunks of ``tc``.

    The window starts at a multiple of 8, for aligned loads. It excludes columns outside of the map for every block.
    """
    other_blocks = (-(-width // s) - 1) * s
    left = min(-(-(kernel_width // 2) // 8) * 8, other_blocks)
    right = min(kernel_width // 2, other_blocks)
    return left, -(-(left + s + right) // tc)


def forward_form(height: int, width: int) -> str:
    """Return the name of the forward pass's kernel for maps of this size."""
    return 'map_forward' if height * width <= _LARGEST_FORWARD_MAP else 'block_forward'


def weight_grad_form(height: int, width: int) -> str:
    """Return the name of the weight gradient's kernel for maps of this size."""
    fits = width <= _WIDEST_GRAD_MAP and _rotated(height, width) <= _LARGEST_GRAD_MAP
    return 'map_weight_grad' if fits else 'block_weight_grad'


def hopper_blocks(width: int) -> int:
    """Return how many blocks of 16 columns the block forms of compute capability 9.0 compute at once."""
    return -(-width // 16)


def fits_hopper(n: int, w: int, kernel_width: int, precision: str, capability: Optional[int], aligned: int) -> bool:
    """Return whether ``hopper_forward`` computes a problem, with fewer products than ``block_forward``.

    A step of it is 3 * J - 2 products of 16 columns and ``n`` images, for maps of J blocks. The other form has 2 * J
    products for kernels up to 17 wide, and fills its programs with the blocks of few images.
    """
    return (
        capability == 90 and precision == 'half' and aligned >= 4     # copies of 8 bytes
        and n >= 16 and hopper_blocks(w) in (2, 4) and 17 < kernel_width <= 33)


def strips(h: int, w: int) -> int:
    """Return how many strips of 16 pixels ``hopper_map_forward`` cuts a map into: rows, or pairs of them."""
    return h if w > 8 else -(-h // 2)


def fits_hopper_map(
        n: int, h: int, w: int, kernel_size: Sequence[int], precision: str, capability: Optional[int],
        aligned: int) -> bool:
    """Return whether ``hopper_map_forward`` computes a problem, faster than the other forms.

    Its products are those of all rows for smaller kernels too, and of 16 images for fewer.
    """
    return (
        capability == 90 and precision == 'half' and n >= 16 and 4 <= h <= 16 and 4 <= w <= 16
        and min(kernel_size) >= 7 and (aligned >= 2 or w % 2 == 1))     # without copies of 4 bytes, only of odd rows


def fits_hopper_grad(h: int, w: int, precision: str, capability: Optional[int], aligned: int) -> bool:
    """Return whether ``hopper_map_weight_grad`` computes a problem; it fills 16 rows and columns."""
    return (
        capability == 90 and precision == 'half' and aligned >= 2       # copies of 4 bytes
        and 8 <= h <= 16 and 8 <= w <= 16)


def fits_hopper_small_grad(h: int, w: int, precision: str, capability: Optional[int]) -> bool:
    """Return whether ``hopper_small_map_weight_grad`` computes a problem; it fills 8 rows and columns."""
    return capability == 90 and precision == 'half' and 4 <= h <= 8 and 4 <= w <= 8


def fits_hopper_block_grad(
        n: int, w: int, kernel_size: Sequence[int], precision: str, capability: Optional[int], aligned: int) -> bool:
    """Return whether ``hopper_block_weight_grad`` computes a problem, faster than ``block_weight_grad``.

    Its products are those of 31 rows and columns for smaller kernels too, and of 16 images for fewer.
    """
    return (
        capability == 90 and precision == 'half' and aligned >= 4     # copies of 8 bytes
        and n >= 16 and hopper_blocks(w) in (2, 4) and min(kernel_size) >= 13 and max(kernel_size) <= 31)


def alignment(width: int, *tensors: Tensor) -> int:
    """Return the largest power of two up to 8 that divides a width and the strides of images and channels."""
    return math.gcd(8, width, *(stride for tensor in tensors for stride in tensor.stride()[:2]))


def _forms(
        step: str, n: int, height: int, width: int, kernel_size: Sequence[int], precision: str,
        capability: Optional[int], aligned: int) -> Tuple[str, ...]:
    """Return the names of the kernels for a step, 'forward' or 'weight_grad', the best one first."""
    if step == 'weight_grad':
        forms = [weight_grad_form(height, width), 'block_weight_grad']
        if fits_hopper_grad(height, width, precision, capability, aligned):
            forms.insert(0, 'hopper_map_weight_grad')
        if fits_hopper_small_grad(height, width, precision, capability):
            forms.insert(0, 'hopper_small_map_weight_grad')
        if fits_hopper_block_grad(n, width, kernel_size, precision, capability, aligned):
            forms.insert(0, 'hopper_block_weight_grad')
    else:
        forms = [forward_form(height, width), 'block_forward']
        if height * width <= _LARGEST_OTHER_FORWARD_MAP:
            forms.append('map_forward')
        if fits_hopper(n, width, kernel_size[1], precision, capability, aligned):
            forms.insert(0, 'hopper_forward')
        if fits_hopper_map(n, height, width, kernel_size, precision, capability, aligned):
            forms.insert(0, 'hopper_map_forward')
    return tuple(dict.fromkeys(forms))


# Kernels by name, each with its tiles.
Candidates = Tuple[Tuple[str, Tuple[Tile, ...]], ...]


def candidates(
        step: str, input: Tensor, kernel_size: Sequence[int], precision: str,
        grad: Optional[Tensor] = None) -> Candidates:
    """Return the kernels that compute a step by name, the best one first, each with the tiles that fit the device.

    The first tile is a tuned one if there is one, otherwise the default; the others are ever smaller.

    Args:
        step: 'forward' or 'weight_grad'.
        input: Images (N, C, H, W), of which shape, dtype and device count.
        kernel_size: Height and width.
        precision: Precision of the products, 'half', 'tf32' or 'ieee'.
        grad: Output gradient, of which strides and address count, if the step reads one beside the input.

    Raises:
        LaunchError: The device has too little for any tile.
    """
    n, _, h, w = input.shape
    capability = _capability(input.device)
    limits = _limits(input.device, capability)
    maps = (input,) if grad is None else (input, grad)
    aligned = alignment(w, *maps) if all(tensor.data_ptr() % 16 == 0 for tensor in maps) else 1
    found = _candidates(
        step, n, h, w, tuple(kernel_size), precision, input.element_size(), capability, limits, aligned)
    if not found:
        size = 'x'.join(map(str, input.shape))
        needed = min(
            tile.shared_memory(limits, input.element_size(), w, kernel_size[1])
            for form in _forms(step, n, h, w, kernel_size, precision, capability, aligned)
            for tile in _ladder(form, n, h, w, tuple(kernel_size), precision, capability))
        raise LaunchError(
            f"backend 'triton' has no kernel for {size} that fits {input.device}: shared memory needed {needed}, "
            f'available {limits.shared_memory}', needed, limits.shared_memory)
    return found


@functools.lru_cache(maxsize=4096)
def _candidates(
        step: str, n: int, h: int, w: int, kernel_size: Tuple[int, ...], precision: str, element_size: int,
        capability: Optional[int], limits: Limits, aligned: int) -> Candidates:
    fitting = {
        form: tuple(
            tile for tile in _ladder(form, n, h, w, kernel_size, precision, capability)
            if tile.fits(limits, element_size, w, kernel_size[1]))
        for form in _forms(step, n, h, w, kernel_size, precision, capability, aligned)
    }
    return tuple((form, tiles) for form, tiles in fitting.items() if tiles)


def _ladder(
        form: str, n: int, h: int, w: int, kernel_size: Tuple[int, ...], precision: str,
        capability: Optional[int]) -> Iterator[Tile]:
    """Yield the tile that is wanted, and ever smaller ones."""
    tuned = _tuned(form, capability, precision, h, w, kernel_size)
    serving = [batch for batch in tuned if batch <= 2 * n]
    tile = tuned[max(serving)] if serving else _DEFAULTS[form](n, h, w, kernel_size, precision)
    while tile is not None:
        yield tile
        tile = tile.smaller()


def _block_width(h: int, w: int, precision: str) -> int:
    """Return the columns of a block: 64 of a sequence, which is one row; 32 if there are no neighbours then."""
    if h == 1 and precision != 'ieee':
        return _between(16, w, 64)
    return 32 if 16 < w <= 32 and precision != 'ieee' else 16


def _rotated(h: int, w: int) -> int:
    """Return the pixels of a map and the room to rotate them by a row."""
    return h * w + w - 1


def _between(least: int, size: int, most: int) -> int:
    """Return the power of two that holds ``size``, within bounds."""
    return min(max(least, 1 << (size - 1).bit_length()), most)


@functools.cache
def _tuned(
        kernel: str, capability: Optional[int], precision: str, h: int, w: int,
        kernel_size: Tuple[int, ...]) -> Dict[int, Tile]:
    """Return the tuned tiles by the batch that they were tuned for."""
    return {
        entry['batch']: TILES[kernel](**entry['tile'])
        for entry in _entries(capability)
        if (entry['kernel'], entry['mode'], entry['height'], entry['width']) == (kernel, precision, h, w)
        and tuple(entry['kernel_size']) == kernel_size
    }


@functools.cache
def _entries(capability: Optional[int]) -> List[Dict[str, Any]]:
    path = _CONFIGS / f'sm_{capability}.json'
    return json.loads(path.read_text()) if path.exists() else []
