"""From tensors to kernels: layouts, sizes, grids."""
import math
from contextlib import contextmanager, nullcontext
from typing import Callable, Dict, Iterator, List, Optional

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from .._backends import LaunchError
from . import kernels, tuning
from .tuning import BlockGradTile, BlockTile, MapGradTile, MapTile

_ELEMENTS_PER_PROGRAM = 1024      # of the two kernels that only copy and add


def forward(input: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """Run the forward kernel that fits the map. Maps (:func:`contiguous_maps`) and weight are contiguous."""
    kernel = tuning.forward_form(*input.shape[2:])
    tile = tuning.get_tile(kernel, input, list(weight.shape[2:]), matmul_precision(input.dtype))
    return _FORMS[kernel](input, weight, bias, tile)


def weight_grad(grad: Tensor, input: Tensor, kernel_size: List[int]) -> Tensor:
    """Run the weight gradient's kernel that fits the map."""
    kernel = tuning.weight_grad_form(*input.shape[2:])
    tile = tuning.get_tile(kernel, input, kernel_size, matmul_precision(input.dtype))
    return _FORMS[kernel](grad, input, kernel_size, tile)


def map_forward(input: Tensor, weight: Tensor, bias: Optional[Tensor], tile: MapTile) -> Tensor:
    """Compute the forward pass in the whole-map form."""
    n, c, h, w = input.shape
    kh, kw = weight.shape[2:]
    output = input.new_empty(input.shape)
    a = _alignment(h * w, input)
    grid = (triton.cdiv(h * w, tile.bo) * triton.cdiv(n, tile.bn) * c,)
    with _launching_on(input):
        kernels.map_forward[grid](
            input, weight, bias, output, n, c, w, h * w // a, *_strides(input, a),
            A=a, KH=kh, KW=kw, COVERS=kh >= 2 * h - 1 and kw >= 2 * w - 1,
            HAS_BIAS=bias is not None, PRECISION=_input_precision(input.dtype),
            BN=tile.bn, BI=tile.bi, BO=tile.bo, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )
    return output


def map_weight_grad(grad: Tensor, input: Tensor, kernel_size: List[int], tile: MapGradTile) -> Tensor:
    """Compute the weight gradient in the whole-map form, for maps that ``tile`` holds."""
    n, c, h, w = input.shape
    kh, kw = kernel_size
    assert tile.bi >= h * w + w - 1 and tile.bo >= w, 'the tile holds the map, and a row to rotate it by'
    weight_grad = input.new_empty((c, 1, kh, kw))
    a = _alignment(h * w, grad, input)
    with _launching_on(input):
        kernels.map_weight_grad[(c,)](
            grad, input, weight_grad, n, h, w, h * w // a, *_strides(grad, a), *_strides(input, a),
            A=a, KH=kh, KW=kw, PRECISION=_input_precision(input.dtype),
            BN=tile.bn, BI=tile.bi, BO=tile.bo, BQ=128, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )
    return weight_grad


def block_forward(input: Tensor, weight: Tensor, bias: Optional[Tensor], tile: BlockTile) -> Tensor:
    """Compute the forward pass in the block form."""
    n, c, h, w = input.shape
    kh, kw = weight.shape[2:]
    output = input.new_empty(input.shape)
    left, chunks = tuning.window(tile.s, tile.tc, w, kw)
    rows = weight.new_empty((c, kh + 2 * (tile.r - 1), chunks, tile.s, tile.tc))
    a = _alignment(w, input)
    blocks = triton.cdiv(n * triton.cdiv(w, tile.s), tile.bp)
    with _launching_on(input):
        kernels.expand_rows[(triton.cdiv(rows.numel(), _ELEMENTS_PER_PROGRAM),)](
            weight, rows, rows.numel(), KH=kh, KW=kw, R=tile.r, S=tile.s,
            LEFT=left, CHUNKS=chunks, TC=tile.tc, BLOCK=_ELEMENTS_PER_PROGRAM,
        )
        kernels.block_forward[(blocks * triton.cdiv(h, tile.r) * c,)](
            input, rows, bias, output, n, c, h, w // a, *_strides(input, a),
            A=a, KH=kh, HAS_BIAS=bias is not None, PRECISION=_input_precision(input.dtype),
            R=tile.r, S=tile.s, LEFT=left, CHUNKS=chunks, TC=tile.tc, BP=tile.bp,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )
    return output


def block_weight_grad(grad: Tensor, input: Tensor, kernel_size: List[int], tile: BlockGradTile) -> Tensor:
    """Compute the weight gradient in the block form."""
    n, c, h, w = input.shape
    kh, kw = kernel_size
    weight_grad = input.new_empty((c, 1, kh, kw))
    left, chunks = tuning.window(tile.s, tile.tc, w, kw)
    programs = c * tile.groups(kh) * chunks
    splits = tile.splits(n, w, programs)
    parts = input.new_empty((splits * programs, 4, tile.d, tile.tc), dtype=torch.float32)
    a = _alignment(w, grad, input)
    with _launching_on(input):
        kernels.block_weight_grad[(splits * programs,)](
            grad, input, parts, n, c, h, w // a, *_strides(grad, a), *_strides(input, a), splits,
            A=a, KH=kh, PRECISION=_input_precision(input.dtype),
            R=tile.r, S=tile.s, LEFT=left, CHUNKS=chunks, TC=tile.tc, D=tile.d, BN=tile.bn, BJ=tile.bj,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )
        kernels.add_parts[(triton.cdiv(weight_grad.numel(), _ELEMENTS_PER_PROGRAM),)](
            parts, weight_grad, c, splits, KH=kh, KW=kw, R=tile.r, LEFT=left, CHUNKS=chunks,
            TC=tile.tc, D=tile.d, BLOCK=_ELEMENTS_PER_PROGRAM,
        )
    return weight_grad


_FORMS: Dict[str, Callable[..., Tensor]] = {
    'map_forward': map_forward, 'map_weight_grad': map_weight_grad,
    'block_forward': block_forward, 'block_weight_grad': block_weight_grad,
}


def matmul_precision(dtype: torch.dtype) -> str:
    """Return the precision of products: 'half', or for float32 'tf32' or 'ieee', as PyTorch is set for convolutions."""
    if dtype != torch.float32:
        return 'half'
    tf32 = torch.backends.cudnn.conv.fp32_precision == 'tf32'  # type: ignore[attr-defined]
    return 'tf32' if tf32 and torch.version.hip is None else 'ieee'


def probe(device: torch.device) -> None:
    """Compile and run a kernel that does nothing."""
    with torch.cuda.device(device):
        kernels.noop_kernel[(1,)]()


def contiguous_maps(tensor: Tensor) -> Tensor:
    """Return a tensor whose maps are contiguous, as the kernels read them; a slice of images or channels stays."""
    h, w = tensor.shape[2:]
    contiguous = (h == 1 or tensor.stride(2) == w) and (w == 1 or tensor.stride(3) == 1)
    return tensor if contiguous else tensor.contiguous()


def _input_precision(dtype: torch.dtype) -> str:
    return 'tf32' if matmul_precision(dtype) == 'tf32' else 'ieee'


def _strides(tensor: Tensor, alignment: int) -> List[int]:
    return [tensor.stride(0) // alignment, tensor.stride(1) // alignment]


def _alignment(width: int, *tensors: Tensor) -> int:
    """Return the largest power of two up to 8 that divides a width and the strides of images and channels."""
    return math.gcd(8, width, *(stride for tensor in tensors for stride in tensor.stride()[:2]))


@contextmanager
def _launching_on(tensor: Tensor) -> Iterator[None]:
    """Make the tensor's device current, for Triton's launch; raise LaunchError if it lacks what the kernel takes."""
    try:
        with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
            yield
    except (OutOfResources, PTXASError) as error:
        is_lack = isinstance(error, OutOfResources)
        lack = f'{error.name} needed {error.required}, available {error.limit}' if is_lack else str(error)
        size = 'x'.join(map(str, tensor.shape))
        raise LaunchError(f"backend 'triton' has no kernel for {size} that fits {tensor.device}: {lack}") from error
