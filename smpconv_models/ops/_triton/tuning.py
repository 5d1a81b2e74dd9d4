"""Tiles: how much of the problem one program takes. Tuned ones are data in configs/, any other problem has a default.

``configs/sm_NN.json`` is a list of ``{kernel, mode, batch, height, width, kernel_size, tile, source}``. A tuned tile
serves the GPUs of its compute capability, and every batch from half of the one it was tuned for.
"""
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

import torch
from torch import Tensor

_CONFIGS = Path(__file__).parent / 'configs'

# Above, gathering a whole map's kernel costs more instructions than the block form takes.
_LARGEST_FORWARD_MAP = 64
# Above, a column of the whole map's product is too much for one program.
_LARGEST_GRAD_MAP, _WIDEST_GRAD_MAP = 256, 16


@dataclass(frozen=True)
class MapTile:
    """Images, input and output pixels of a step."""
    bn: int
    bi: int
    bo: int
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class MapGradTile(MapTile):
    """``bi`` holds the whole map, ``bo`` a row of it."""


@dataclass(frozen=True)
class BlockTile:
    """Blocks of ``r`` rows and ``s`` columns, chunks of ``tc`` columns, ``bp`` blocks a program."""
    r: int
    s: int
    tc: int
    bp: int
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class BlockGradTile:
    """Blocks of ``r`` rows and ``s`` columns against ``d`` rows and ``tc`` columns; ``bn * bj`` blocks a step."""
    r: int
    s: int
    d: int
    tc: int
    bn: int
    bj: int
    num_warps: int = 8
    num_stages: int = 3

    def __post_init__(self) -> None:
        assert self.r <= self.d and self.s <= self.tc, 'a diagonal goes round the end once'

    def groups(self, kernel_height: int) -> int:
        """How many times ``d`` rows cover the input rows of a block."""
        return -(-(kernel_height + self.r - 1) // self.d)

    def splits(self, batch: int, width: int, programs: int) -> int:
        """In how many parts a sum is taken so that a GPU has enough programs."""
        steps = -(-batch // self.bn) * -(-width // (self.s * self.bj))
        return max(1, min(steps, 256 // programs))


Tile = Union[MapTile, BlockTile, BlockGradTile]
TILES: Dict[str, Any] = {
    'map_forward': MapTile, 'map_weight_grad': MapGradTile,
    'block_forward': BlockTile, 'block_weight_grad': BlockGradTile,
}


def window(s: int, tc: int, width: int, kernel_width: int) -> Tuple[int, int]:
    """The input columns that ``s`` output columns see: how many before the first, and in how many chunks of ``tc``.

    Starts at a multiple of 8, for aligned loads, and leaves out what lies outside the map for every block.
    """
    other_blocks = (-(-width // s) - 1) * s
    left = min(-(-(kernel_width // 2) // 8) * 8, other_blocks)
    right = min(kernel_width // 2, other_blocks)
    return left, -(-(left + s + right) // tc)


def forward_form(height: int, width: int) -> str:
    """The kernel for the forward pass of such maps."""
    return 'map_forward' if height * width <= _LARGEST_FORWARD_MAP else 'block_forward'


def weight_grad_form(height: int, width: int) -> str:
    """The kernel for the weight gradient of such maps."""
    fits = width <= _WIDEST_GRAD_MAP and _rotated(height, width) <= _LARGEST_GRAD_MAP
    return 'map_weight_grad' if fits else 'block_weight_grad'


def tile(kernel: str, input: Tensor, kernel_size: List[int], mode: str) -> Any:
    """The tile of a kernel by name: a tuned one if there is one, else the default.

    ``mode`` is 'half', 'tf32' or 'exact': how products are made.
    """
    n, _, h, w = input.shape
    entries = _tuned(kernel, _capability(input.device), mode, h, w, tuple(kernel_size))
    fitting = [batch for batch in entries if batch <= 2 * n]
    if fitting:
        return entries[max(fitting)]
    return _DEFAULTS[kernel](n, h, w, kernel_size, mode)


def _default_map(n: int, h: int, w: int, kernel_size: List[int], mode: str) -> MapTile:
    most = 32 if mode == 'exact' else 64
    return MapTile(bn=_between(16, n, most), bi=16, bo=_between(16, h * w, 2 * most))


def _default_map_grad(n: int, h: int, w: int, kernel_size: List[int], mode: str) -> MapGradTile:
    return MapGradTile(
        bn=_between(16, n, {'half': 64, 'tf32': 32, 'exact': 16}[mode]), bo=16,
        bi=_between(16, _rotated(h, w), _LARGEST_GRAD_MAP), num_stages=1,
    )


def _default_block(n: int, h: int, w: int, kernel_size: List[int], mode: str) -> BlockTile:
    s = _block_width(w, mode)
    tc = 32 if s == 32 or (mode == 'half' and window(s, 32, w, kernel_size[1])[1] == 1) else 16
    r = _between(1, h, 4 if mode == 'exact' else 8)
    bp = _between(16, n * -(-w // s), {'half': 128, 'tf32': 64, 'exact': 32}[mode] * 16 // s)
    return BlockTile(r=r, s=s, tc=tc, bp=bp, num_warps=8 if r * s * bp > 8192 else 4)


def _default_block_grad(n: int, h: int, w: int, kernel_size: List[int], mode: str) -> BlockGradTile:
    s = _block_width(w, mode)
    d = {'half': 8, 'tf32': 8, 'exact': 4}[mode] * 16 // s
    step = {'half': 64, 'tf32': 32, 'exact': 16}[mode]
    bn = _between(1, n, step)
    return BlockGradTile(
        r=_between(1, h, d), s=s, d=d, tc=s, bn=bn, bj=step // bn, num_warps=4 if mode == 'exact' else 8)


def _block_width(w: int, mode: str) -> int:
    """One block across where 32 columns do, and no neighbours with it."""
    return 32 if 16 < w <= 32 and mode != 'exact' else 16


_DEFAULTS: Dict[str, Callable[..., Tile]] = {
    'map_forward': _default_map, 'map_weight_grad': _default_map_grad,
    'block_forward': _default_block, 'block_weight_grad': _default_block_grad,
}


def _rotated(h: int, w: int) -> int:
    """The pixels of a map, and the room to rotate them by a row."""
    return h * w + w - 1


def _between(least: int, size: int, most: int) -> int:
    """The power of two that holds ``size``, within bounds."""
    return min(max(least, 1 << (size - 1).bit_length()), most)


def _capability(device: torch.device) -> Optional[int]:
    if device.type != 'cuda' or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _tuned(
        kernel: str, capability: Optional[int], mode: str, h: int, w: int, kernel_size: Tuple[int, ...],
) -> Dict[int, Tile]:
    """Tuned tiles by the batch they were tuned for."""
    return {
        entry['batch']: TILES[kernel](**entry['tile'])
        for entry in _entries(capability)
        if (entry['kernel'], entry['mode'], entry['height'], entry['width']) == (kernel, mode, h, w)
        and tuple(entry['kernel_size']) == kernel_size
    }


@functools.cache
def _entries(capability: Optional[int]) -> List[Dict[str, Any]]:
    path = _CONFIGS / f'sm_{capability}.json'
    return json.loads(path.read_text()) if path.exists() else []
