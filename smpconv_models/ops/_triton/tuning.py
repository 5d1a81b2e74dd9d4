"""Tiles: how much of the problem one program takes. Tuned tiles are data in configs/; other problems get a default.

``configs/sm_NN.json`` is a list of ``{kernel, mode, batch, height, width, kernel_size, tile, source}``; ``mode`` is the
precision of the products. A tuned tile serves the GPUs of its compute capability, and every batch from half of the one
that it was tuned for.
"""
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
from torch import Tensor

_CONFIGS = Path(__file__).parent / 'configs'

# Above this size, gathering a whole map's kernel costs more instructions than the block form takes.
_LARGEST_FORWARD_MAP = 64
# Above these sizes, a column of the whole map's product is too much for one program.
_LARGEST_GRAD_MAP, _WIDEST_GRAD_MAP = 256, 16


@dataclass(frozen=True)
class MapTile:
    """Images, input pixels and output pixels of a step."""
    bn: int
    bi: int
    bo: int
    num_warps: int = 4
    num_stages: int = 3

    @classmethod
    def default(cls, n: int, h: int, w: int, kernel_size: List[int], precision: str) -> 'MapTile':
        most = 32 if precision == 'ieee' else 64
        return cls(bn=_between(16, n, most), bi=16, bo=_between(16, h * w, 2 * most))


@dataclass(frozen=True)
class MapGradTile(MapTile):
    """``bi`` holds the whole map, ``bo`` a row of it."""

    @classmethod
    def default(cls, n: int, h: int, w: int, kernel_size: List[int], precision: str) -> 'MapGradTile':
        return cls(
            bn=_between(16, n, {'half': 64, 'tf32': 32, 'ieee': 16}[precision]), bo=16,
            bi=_between(16, _rotated(h, w), _LARGEST_GRAD_MAP), num_stages=1)


@dataclass(frozen=True)
class BlockTile:
    """Blocks of ``r`` rows and ``s`` columns, chunks of ``tc`` columns, ``bp`` blocks per program."""
    r: int
    s: int
    tc: int
    bp: int
    num_warps: int = 4
    num_stages: int = 3

    @classmethod
    def default(cls, n: int, h: int, w: int, kernel_size: List[int], precision: str) -> 'BlockTile':
        s = _block_width(w, precision)
        tc = 32 if s == 32 or (precision == 'half' and window(s, 32, w, kernel_size[1])[1] == 1) else 16
        r = _between(1, h, 4 if precision == 'ieee' else 8)
        bp = _between(16, n * -(-w // s), {'half': 128, 'tf32': 64, 'ieee': 32}[precision] * 16 // s)
        return cls(r=r, s=s, tc=tc, bp=bp, num_warps=8 if r * s * bp > 8192 else 4)


@dataclass(frozen=True)
class BlockGradTile:
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
    def default(cls, n: int, h: int, w: int, kernel_size: List[int], precision: str) -> 'BlockGradTile':
        s = _block_width(w, precision)
        d = {'half': 8, 'tf32': 8, 'ieee': 4}[precision] * 16 // s
        step = {'half': 64, 'tf32': 32, 'ieee': 16}[precision]
        bn = _between(1, n, step)
        return cls(r=_between(1, h, d), s=s, d=d, tc=s, bn=bn, bj=step // bn, num_warps=4 if precision == 'ieee' else 8)

    def groups(self, kernel_height: int) -> int:
        """Return how many times ``d`` rows cover the input rows of a block."""
        return -(-(kernel_height + self.r - 1) // self.d)

    def splits(self, batch: int, width: int, programs: int) -> int:
        """Return in how many parts a sum is taken, so that a GPU has enough programs."""
        steps = -(-batch // self.bn) * -(-width // (self.s * self.bj))
        return max(1, min(steps, 256 // programs))


Tile = Union[MapTile, BlockTile, BlockGradTile]
TILES: Dict[str, Any] = {
    'map_forward': MapTile, 'map_weight_grad': MapGradTile,
    'block_forward': BlockTile, 'block_weight_grad': BlockGradTile,
}
_DEFAULTS = {name: tile.default for name, tile in TILES.items()}


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


def get_tile(kernel: str, input: Tensor, kernel_size: List[int], precision: str) -> Any:
    """Return the tile of a kernel by name: a tuned one if there is one, otherwise the default.

    ``precision`` is that of the products: 'half', 'tf32' or 'ieee'.
    """
    n, _, h, w = input.shape
    entries = _tuned(kernel, _capability(input.device), precision, h, w, tuple(kernel_size))
    fitting = [batch for batch in entries if batch <= 2 * n]
    if fitting:
        return entries[max(fitting)]
    return _DEFAULTS[kernel](n, h, w, kernel_size, precision)


def _block_width(w: int, precision: str) -> int:
    """Return 32 if the map then has one block across, and no neighbours."""
    return 32 if 16 < w <= 32 and precision != 'ieee' else 16


def _rotated(h: int, w: int) -> int:
    """Return the pixels of a map and the room to rotate them by a row."""
    return h * w + w - 1


def _between(least: int, size: int, most: int) -> int:
    """Return the power of two that holds ``size``, within bounds."""
    return min(max(least, 1 << (size - 1).bit_length()), most)


def _capability(device: torch.device) -> Optional[int]:
    if device.type != 'cuda' or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


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
