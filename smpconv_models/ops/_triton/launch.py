"""From tensors to kernels: layouts, sizes, grids, and the first tile that the device takes."""
import copy
import logging
import math
import subprocess
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources

from .._backends import LaunchError, is_capturing
from .._problem import memory_format_of
from . import kernels, tuning
from .tuning import (
    BlockGradTile,
    BlockTile,
    HopperBlockGradTile,
    HopperGradTile,
    HopperMapTile,
    HopperTile,
    MapGradTile,
    MapTile,
    alignment,
)

_logger = logging.getLogger(__name__)

_ELEMENTS_PER_PROGRAM = 1024    # of the kernels that only expand and add
_TRANSPOSED_PER_PROGRAM = 64        # pixels and channels
_MOST_PROGRAMS = 2 ** 31 - 1

# A compiler's pass and the driver raise RuntimeError; the programs that Triton calls, the last two.
TOOLCHAIN_ERRORS = (TritonError, RuntimeError, OSError, subprocess.SubprocessError)


def forward(input: Tensor, weight: Tensor, bias: Optional[Tensor], flipped: bool = False) -> Tensor:
    """Run the forward kernel that fits the map and the device, on :func:`contiguous_maps` and a contiguous weight.

    Args:
        input: Images (N, C, H, W).
        weight: Kernels (C, 1, kh, kw).
        bias: Biases (C,) or None.
        flipped: Whether to rotate the kernels by 180 degrees, which makes it the input's gradient.

    Returns:
        Images (N, C, H, W).

    Raises:
        LaunchError: No kernel fits the device, or none could be built.
    """
    return _run_first_that_launches('forward', input, weight.shape[2:], input, weight, bias, flipped=flipped)


def weight_grad(grad: Tensor, input: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """Run the weight gradient's kernel that fits the map and the device.

    Args:
        grad: Gradient of the output (N, C, H, W), in :func:`contiguous_maps` as the input.
        input: Images (N, C, H, W).
        kernel_size: Height and width of the kernels.

    Returns:
        Gradient of the kernels (C, 1, kh, kw).

    Raises:
        LaunchError: No kernel fits the device, or none could be built.
    """
    return _run_first_that_launches('weight_grad', input, kernel_size, grad, input, list(kernel_size))


_refused: Dict[Tuple[Any, ...], LaunchError] = {}


def _run_first_that_launches(
        step: str, input: Tensor, kernel_size: Sequence[int], *args: Any, **options: Any) -> Tensor:
    """Run the first form and tile that the device takes, and remember for the problem those that it refused."""
    precision = matmul_precision(input.dtype)
    problem = (input.shape, input.dtype, precision, *kernel_size, input.device)
    error = None
    grad = args[0] if step == 'weight_grad' else None
    for form, tiles in tuning.candidates(step, input, kernel_size, precision, grad):
        for tile in tiles:
            key = (form, tile, problem)
            error = _refused.get(key)
            if error is None:
                try:
                    if form in _EXPERIMENTAL and input.is_cuda:
                        _check_experimental(form, input.device, input.dtype)
                    return _FORMS[form](*args, tile=tile, **options)
                except LaunchError as failure:
                    error = copy.copy(failure)      # without its traceback, which would keep the tensors
                    if error.is_permanent and not is_capturing():
                        _refused[key] = error
                        _logger.debug('%s with %s is passed over: %s', form, tile, error)
            if error.needed is None:
                break       # a smaller tile would fail as well
    assert error is not None, 'there is a candidate'
    raise copy.copy(error)


def map_forward(
        input: Tensor, weight: Tensor, bias: Optional[Tensor], tile: MapTile, flipped: bool = False) -> Tensor:
    """Compute the forward pass in the whole-map form."""
    n, c, h, w = input.shape
    kh, kw = weight.shape[2:]
    output = input.new_empty(input.shape)
    a = alignment(h * w, input)
    with _launching(input):
        kernels.map_forward[_grid(triton.cdiv(h * w, tile.bo) * triton.cdiv(n, tile.bn) * c)](
            input, weight, bias, output, n, c, w, h * w // a, *_strides(input, a),
            A=a, KH=kh, KW=kw, FLIPPED=flipped, COVERS=kh >= 2 * h - 1 and kw >= 2 * w - 1,
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
    a = alignment(h * w, grad, input)
    with _launching(input):
        kernels.map_weight_grad[_grid(c)](
            grad, input, weight_grad, n, h, w, h * w // a, *_strides(grad, a), *_strides(input, a),
            A=a, KH=kh, KW=kw, PRECISION=_input_precision(input.dtype),
            BN=tile.bn, BI=tile.bi, BO=tile.bo, BQ=128, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )
    return weight_grad


def block_forward(
        input: Tensor, weight: Tensor, bias: Optional[Tensor], tile: BlockTile, flipped: bool = False) -> Tensor:
    """Compute the forward pass in the block form."""
    n, c, h, w = input.shape
    kh, kw = weight.shape[2:]
    output = input.new_empty(input.shape)
    left, chunks = tuning.window(tile.s, tile.tc, w, kw)
    rows = weight.new_empty((c, kh + 2 * (tile.r - 1), chunks, tile.s, tile.tc))
    a = alignment(w, input)
    blocks = triton.cdiv(n * triton.cdiv(w, tile.s), tile.bp)
    with _launching(input):
        kernels.expand_rows[_grid(triton.cdiv(rows.numel(), _ELEMENTS_PER_PROGRAM))](
            weight, rows, rows.numel(), KH=kh, KW=kw, FLIPPED=flipped, R=tile.r, S=tile.s,
            LEFT=left, CHUNKS=chunks, TC=tile.tc, BLOCK=_ELEMENTS_PER_PROGRAM,
        )
        kernels.block_forward[_grid(blocks * triton.cdiv(h, tile.r) * c)](
            input, rows, bias, output, n, c, h, w // a, *_strides(input, a),
            A=a, KH=kh, HAS_BIAS=bias is not None, PRECISION=_input_precision(input.dtype),
            R=tile.r, S=tile.s, LEFT=left, CHUNKS=chunks, UNROLL=tile.unrolled(chunks), TC=tile.tc, BP=tile.bp,
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
    a = alignment(w, grad, input)
    with _launching(input):
        kernels.block_weight_grad[_grid(splits * programs)](
            grad, input, parts, n, c, h, w // a, *_strides(grad, a), *_strides(input, a), splits,
            A=a, KH=kh, PRECISION=_input_precision(input.dtype),
            R=tile.r, S=tile.s, LEFT=left, CHUNKS=chunks, TC=tile.tc, D=tile.d, BN=tile.bn, BJ=tile.bj,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )
        kernels.add_parts[_grid(triton.cdiv(weight_grad.numel(), _ELEMENTS_PER_PROGRAM))](
            parts, weight_grad, c, splits, KH=kh, KW=kw, R=tile.r, LEFT=left, CHUNKS=chunks,
            TC=tile.tc, D=tile.d, BLOCK=_ELEMENTS_PER_PROGRAM,
        )
    return weight_grad


def hopper_forward(
        input: Tensor, weight: Tensor, bias: Optional[Tensor], tile: HopperTile, flipped: bool = False) -> Tensor:
    """Compute the forward pass in the block form of compute capability 9.0, where :func:`tuning.fits_hopper`."""
    n, c, h, w = input.shape
    kh, kw = weight.shape[2:]
    output = input.new_empty(input.shape)
    fragments = weight.new_empty((c, kh + 15, 3, 32, 8))
    a = alignment(w, input)
    assert a >= 4 and kw <= 33, 'copies of 8 bytes, and one neighbour to each side'
    hopper = _import_hopper()
    with _launching(input):
        kernels.expand_fragments[_grid(triton.cdiv(fragments.numel(), _ELEMENTS_PER_PROGRAM))](
            weight, fragments, fragments.numel(), KH=kh, KW=kw, FLIPPED=flipped, BLOCK=_ELEMENTS_PER_PROGRAM,
        )
        hopper.hopper_forward[_grid(triton.cdiv(n, tile.bn) * triton.cdiv(h, 8) * c)](
            input, fragments, bias, output, n, c, h, w // a, *_strides(input, a),
            A=a, KH=kh, HAS_BIAS=bias is not None, J=tuning.hopper_blocks(w), BN=tile.bn, STAGES=tile.num_stages,
            num_warps=tile.num_warps,
        )
    return output


def hopper_map_forward(
        input: Tensor, weight: Tensor, bias: Optional[Tensor], tile: HopperMapTile, flipped: bool = False) -> Tensor:
    """Compute the forward pass of small maps for compute capability 9.0, where :func:`tuning.fits_hopper_map`."""
    n, c, h, w = input.shape
    kh, kw = weight.shape[2:]
    output = input.new_empty(input.shape)
    a = alignment(w, input)
    assert h <= 16 and w <= 16, 'strips of 16 columns, all unrolled'
    hopper = _import_hopper()
    programs = triton.cdiv(n, tile.bn) * triton.cdiv(tuning.strips(h, w), tile.num_warps) * c
    with _launching(input):
        hopper.hopper_map_forward[_grid(programs)](
            input, weight, bias, output, n, c, *_strides(input, a),
            A=a, HEIGHT=h, WIDTH=w, KH=kh, KW=kw, FLIPPED=flipped, HAS_BIAS=bias is not None, R=tile.num_warps,
            BN=tile.bn, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )
    return output


def hopper_map_weight_grad(grad: Tensor, input: Tensor, kernel_size: List[int], tile: HopperGradTile) -> Tensor:
    """Compute the weight gradient in the whole-map form of compute capability 9.0, where it fits the map.

    See :func:`tuning.fits_hopper_grad`.
    """
    c, h, w = input.shape[1:]
    kh, kw = kernel_size
    a = alignment(w, grad, input)
    assert a >= 2 and h <= 16 and w <= 16, 'copies of 4 bytes, and 16 rows of 16 columns'
    reached = kh <= 2 * h - 1 and kw <= 31
    weight_grad = (input.new_empty if reached else input.new_zeros)((c, 1, kh, kw))
    hopper = _import_hopper()
    with _launching(input):
        hopper.hopper_map_weight_grad[_grid(c)](
            grad, input, weight_grad, len(input), *_strides(grad, a), *_strides(input, a),
            A=a, HEIGHT=h, WIDTH=w, KH=kh, KW=kw, BN=tile.bn, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )
    return weight_grad


def hopper_small_map_weight_grad(
        grad: Tensor, input: Tensor, kernel_size: List[int], tile: HopperGradTile) -> Tensor:
    """Compute the weight gradient of small maps for compute capability 9.0.

    See :func:`tuning.fits_hopper_small_grad`.
    """
    c, h, w = input.shape[1:]
    kh, kw = kernel_size
    a = alignment(w, grad, input)
    assert h <= 8 and w <= 8, 'one product of 64 pixels'
    reached = kh <= 15 and kw <= 15
    weight_grad = (input.new_empty if reached else input.new_zeros)((c, 1, kh, kw))
    hopper = _import_hopper()
    with _launching(input):
        hopper.hopper_small_map_weight_grad[_grid(c)](
            grad, input, weight_grad, len(input), *_strides(grad, a), *_strides(input, a),
            A=a, HEIGHT=h, WIDTH=w, KH=kh, KW=kw, BN=tile.bn, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )
    return weight_grad


def hopper_block_weight_grad(
        grad: Tensor, input: Tensor, kernel_size: List[int], tile: HopperBlockGradTile) -> Tensor:
    """Compute the weight gradient in the block form of compute capability 9.0, where it fits the problem.

    See :func:`tuning.fits_hopper_block_grad`.
    """
    n, c, h, w = input.shape
    kh, kw = kernel_size
    a = alignment(w, grad, input)
    assert a >= 4 and kh <= 31 and kw <= 31, 'copies of 8 bytes, and the sums of 32 rows and columns'
    weight_grad = input.new_empty((c, 1, kh, kw))
    splits = triton.cdiv(n, tile.bn)
    parts = input.new_empty((splits, c, kh, kw), dtype=torch.promote_types(torch.float32, input.dtype))
    hopper = _import_hopper()
    with _launching(input):
        hopper.hopper_block_weight_grad[_grid(splits * c)](
            grad, input, parts, n, c, h, w // a, *_strides(grad, a), *_strides(input, a),
            A=a, KH=kh, KW=kw, J=tuning.hopper_blocks(w), BN=tile.bn, AHEAD=tile.num_stages,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )
        kernels.add_splits[_grid(triton.cdiv(weight_grad.numel(), _ELEMENTS_PER_PROGRAM))](
            parts, weight_grad, weight_grad.numel(), splits, BLOCK=_ELEMENTS_PER_PROGRAM,
        )
    return weight_grad


def _import_hopper() -> ModuleType:
    try:
        from . import hopper
    except (ImportError, AttributeError, TypeError, ValueError) as error:   # as of a version with other names
        raise LaunchError(f"backend 'triton' cannot import Gluon: {error}") from error
    return hopper


_FORMS: Dict[str, Callable[..., Tensor]] = {
    'map_forward': map_forward, 'map_weight_grad': map_weight_grad,
    'block_forward': block_forward, 'block_weight_grad': block_weight_grad,
    'hopper_forward': hopper_forward, 'hopper_map_weight_grad': hopper_map_weight_grad,
    'hopper_map_forward': hopper_map_forward, 'hopper_block_weight_grad': hopper_block_weight_grad,
    'hopper_small_map_weight_grad': hopper_small_map_weight_grad,
}
# In Gluon, which is experimental, with the forms that compute the same.
_EXPERIMENTAL = {
    'hopper_forward': 'block_forward', 'hopper_map_weight_grad': 'block_weight_grad',
    'hopper_map_forward': 'block_forward', 'hopper_block_weight_grad': 'block_weight_grad',
    'hopper_small_map_weight_grad': 'block_weight_grad',
}
# Images (N, C, H, W) and the sizes of kernels with which both are compared.
_COMPARED_SIZES = {
    'hopper_forward': [(17, 2, 19, 56, 31)], 'hopper_map_weight_grad': [(33, 2, 14, 14, 27)],
    'hopper_map_forward': [(33, 2, 14, 14, 27), (33, 2, 7, 7, 13)], 'hopper_block_weight_grad': [(17, 2, 19, 56, 31)],
    'hopper_small_map_weight_grad': [(33, 2, 7, 7, 13)],
}
_MAX_EXPERIMENTAL_ERROR = 2 ** -7       # relative: two roundings of bfloat16
_checked: Dict[Tuple[str, torch.device, torch.dtype], Optional[LaunchError]] = {}


def _check_experimental(form: str, device: torch.device, dtype: torch.dtype) -> None:
    """Compare an experimental form with the other one on a small problem, once for each device and dtype.

    A version of Triton may build it and still compute something else.

    Raises:
        LaunchError: The results differ, or a CUDA graph is captured, during which nothing can be compared.
    """
    key = (form, device, dtype)
    if key not in _checked:
        if is_capturing():
            raise LaunchError(f'{form} is not checked while a CUDA graph is captured', is_permanent=False)
        is_forward = form.endswith('forward')
        generator = torch.Generator().manual_seed(0)
        error = 0.
        for n, c, h, w, k in _COMPARED_SIZES[form]:
            x, grad, weight = (
                torch.randn(size, generator=generator).to(device, dtype)
                for size in ((n, c, h, w), (n, c, h, w), (c, 1, k, k)))
            args = (x, weight, None) if is_forward else (grad, x, [k, k])
            got, expected = (
                _FORMS[name](*args, tile=tuning.TILES[name].default(n, h, w, [k, k], 'half')).float()
                for name in (form, _EXPERIMENTAL[form]))
            error += ((got - expected).norm() / expected.norm()).item()     # NaN stays
        _checked[key] = None if error <= _MAX_EXPERIMENTAL_ERROR else LaunchError(
            f'{form} computes something else with Triton {triton.__version__}: relative error {error:.1e}')
    failure = _checked[key]
    if failure is not None:
        raise copy.copy(failure)


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
    """Return a tensor whose maps are contiguous, as the kernels read them.

    A slice of images or channels stays as it is, and the channels of channels_last are transposed behind the pixels.
    """
    n, c, h, w = tensor.shape
    _, c_stride, h_stride, w_stride = tensor.stride()
    if (h == 1 or h_stride == w) and (w == 1 or w_stride == 1):
        return tensor
    pixel_stride = h_stride if w == 1 else w_stride
    if tensor.numel() and c_stride == 1 and (h == 1 or h_stride == w * pixel_stride):
        return _transposed(tensor.new_empty(n, c, h, w), tensor, h * w, c, pixel_stride)
    return tensor.contiguous()


def laid_out_like(maps: Tensor, other: Tensor) -> Tensor:
    """Return contiguous maps in the layout of another tensor, channels_last or contiguous."""
    memory_format = memory_format_of(other)
    if memory_format == torch.contiguous_format or maps.numel() == 0:
        return maps.contiguous(memory_format=memory_format)
    _, c, h, w = maps.shape
    return _transposed(torch.empty_like(maps, memory_format=memory_format), maps, c, h * w, h * w)


def _transposed(output: Tensor, input: Tensor, rows: int, columns: int, row_stride: int) -> Tensor:
    """Write every image of ``input``, a matrix of contiguous columns, transposed to ``output``."""
    a = math.gcd(8, columns, row_stride, input.stride(0))
    b = math.gcd(8, rows)
    tiles = triton.cdiv(rows, _TRANSPOSED_PER_PROGRAM) * triton.cdiv(columns, _TRANSPOSED_PER_PROGRAM)
    with _launching(input):
        kernels.transpose_maps[_grid(len(input) * tiles)](
            input, output, rows // b, columns // a, input.stride(0) // a, row_stride // a,
            A=a, B=b, BP=_TRANSPOSED_PER_PROGRAM, BQ=_TRANSPOSED_PER_PROGRAM,
        )
    return output


def _input_precision(dtype: torch.dtype) -> str:
    return 'tf32' if matmul_precision(dtype) == 'tf32' else 'ieee'


def _strides(tensor: Tensor, alignment: int) -> List[int]:
    return [tensor.stride(0) // alignment, tensor.stride(1) // alignment]



def _grid(programs: int) -> Tuple[int]:
    if programs > _MOST_PROGRAMS:   # a smaller tile needs more
        raise LaunchError(f"backend 'triton' needs {programs} programs, available {_MOST_PROGRAMS}")
    return (programs,)


@contextmanager
def _launching(input: Tensor) -> Iterator[None]:
    """Make the input's device current, for Triton's launch, and raise the toolchain's errors as LaunchError."""
    try:
        with torch.cuda.device(input.device) if input.is_cuda else nullcontext():
            yield
    except (LaunchError, torch.OutOfMemoryError):
        raise
    except OutOfResources as error:
        size = 'x'.join(map(str, input.shape))
        raise LaunchError(
            f"backend 'triton' has no kernel for {size} that fits {input.device}: {error.name} needed "
            f'{error.required}, available {error.limit}', error.required, error.limit) from error
    except TOOLCHAIN_ERRORS as error:
        is_permanent = not str(error).startswith('Triton Error [')      # else the driver's, such as a lack of memory
        raise LaunchError(
            f"backend 'triton' could not run its kernel on {input.device}: {reason_line(error)}",
            is_permanent=is_permanent) from error


def reason_line(error: Exception) -> str:
    """Return the line of an error's message that has the reason: a compiler's follows the source."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if isinstance(error, CompilationError) else 0]
