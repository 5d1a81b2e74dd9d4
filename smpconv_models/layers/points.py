"""Self-moving point representations: a continuous function as points with positions, weights and radii.

Pure functions for any number of dimensions. Shapes: P points, d coordinates, C channels, Q queries, ``...`` any
leading dimensions, broadcast against each other.

Long kernels are sampled in chunks, so that points times elements are never held at once. A kernel of 16,000 steps with
30 filters of 30 points has 14 million pairs of a point and an element, and the gradient needs several numbers of each.
But tents are local: each chunk of elements takes only the points whose tents overlap it, and the backward pass
recomputes a chunk's intermediate values instead of keeping them.

Kim & Park, SMPConv: Self-moving Point Representations for Continuous Convolution, CVPR 2023, section 3.1.
"""
import math
from typing import Any, Callable, Iterator, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary, has_torch_function_variadic
from torch.utils.checkpoint import checkpoint

from smpconv_models.ops import is_exporting

# Pairs of a point and an element that may be held at once: 16 MB in float32, a few times as much in the backward pass.
# Chunks have a quarter of them. Smaller chunks have fewer overlapping points, but each costs a millisecond.
_MAX_PAIRS = 1 << 22


def tent_basis(query: Tensor, coords: Tensor, radius: Tensor) -> Tensor:
    """Evaluate equation 2, cut off at zero: ``relu(1 - |x - p|_1 / r)``.

    Args:
        query: ``(..., Q, d)``, positions to evaluate at.
        coords: ``(..., P, d)``, the points' positions.
        radius: ``(..., P)``, positive.

    Returns:
        ``(..., P, Q)`` in the widest of the dtypes, 1 on a point, falling linearly to 0 at its radius, 0 beyond.
    """
    # one coordinate at a time: d is 1 to 3, and a (..., P, Q, d) tensor costs more than the loop
    distance = (coords[..., 0].unsqueeze(-1) - query[..., 0].unsqueeze(-2)).abs()
    for axis in range(1, coords.shape[-1]):
        distance = distance + (coords[..., axis].unsqueeze(-1) - query[..., axis].unsqueeze(-2)).abs()
    return _tents(distance, radius)


def _tents(distance: Tensor, radius: Tensor) -> Tensor:
    return (1 - distance / radius.unsqueeze(-1)).relu()


def _grid_tents(kernel_size: List[int], coords: Tensor, radius: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute ``tent_basis(sampling_grid(kernel_size), coords, radius)``, to the bit.

    An L1 distance on a grid is a sum of distances along the axes, which are as few as the sides are long.
    """
    last = len(kernel_size) - 1
    steps = _axis_positions(kernel_size[last], coords.device, dtype)
    along_axes = coords.unbind(-1)
    distance = (along_axes[0].unsqueeze(-1) - steps).abs()
    for axis in range(1, len(kernel_size)):
        if kernel_size[last - axis] != kernel_size[last - axis + 1]:
            steps = _axis_positions(kernel_size[last - axis], coords.device, dtype)
        along_axis = (along_axes[axis].unsqueeze(-1) + steps).abs()  # positions grow against the axis
        distance = (along_axis.unsqueeze(-1) + distance.unsqueeze(-2)).flatten(-2)
    return _tents(distance, radius)


def evaluate_points(
        query: Tensor, coords: Tensor, radius: Tensor, weights: Tensor, normalize: bool = True,
        eps: float = 1e-6) -> Tensor:
    """Evaluate equation 1: the function's value at each query, from the points whose radius covers the query.

    Differentiable in ``coords``, ``radius`` and ``weights`` (and ``query``), almost everywhere.

    Args:
        query: ``(..., Q, d)``.
        coords: ``(..., P, d)``.
        radius: ``(..., P)``, positive; see :func:`clip_radius`.
        weights: ``(..., C, P)``, each point's value in each channel.
        normalize: Whether to divide by the number of points that cover the query, ``|N(x)|``, as equation 1 does. The
            ImageNet models do not.
        eps: Number added to ``|N(x)|``, so that queries outside of all radii get 0.

    Returns:
        ``(..., C, Q)`` in the dtype of ``weights``. Computed in the widest of the dtypes; under autocast the product
        of weights and tents is in autocast's.
    """
    return _weighted_sum(weights, _normalize(tent_basis(query, coords, radius), normalize, eps))


def _weighted_sum(weights: Tensor, g: Tensor) -> Tensor:
    return (weights.to(g.dtype) @ g).to(weights.dtype)


def _normalize(g: Tensor, normalize: bool, eps: float = 1e-6) -> Tensor:
    if normalize:
        g = g / ((g > 0).sum(dim=-2, keepdim=True, dtype=g.dtype) + eps)
    return g


def sampling_grid(
        kernel_size: List[int], device: Optional[torch.device] = None, dtype: Optional[torch.dtype] = None) -> Tensor:
    """Return the positions of a kernel's elements among the points: evenly over [-1, 1] in each dimension.

    Coordinates are Cartesian: the first grows along the kernel's last axis (x, to the right), every other one
    against its axis (y, up the rows), so that the kernel needs no transposing or flipping afterwards.

    Args:
        kernel_size: Elements along each axis of the kernel tensor, e.g. ``[height, width]``.
        device: Device of the result.
        dtype: Dtype of the result, float32 by default.

    Returns:
        ``(Q, d)``, the kernel's elements in row-major order. An axis of size 1 lies at 0.
    """
    axes: List[Tensor] = []
    for axis, size in enumerate(kernel_size):
        position = _axis_positions(size, device, dtype if dtype is not None else torch.float32)
        axes.append(position if axis == len(kernel_size) - 1 else -position)
    grid = torch.meshgrid(axes, indexing='ij')
    return torch.stack([grid[axis].flatten() for axis in range(len(grid) - 1, -1, -1)], dim=-1)


def _axis_positions(size: int, device: Optional[torch.device], dtype: torch.dtype) -> Tensor:
    return torch.arange(1 - size, size, 2, device=device, dtype=dtype) / max(size - 1, 1)


def sample_kernel(
        coords: Tensor, radius: Tensor, weights: Tensor, kernel_size: List[int], normalize: bool = True) -> Tensor:
    """Sample the kernel: :func:`evaluate_points` on :func:`sampling_grid`. A leaf function for fx.

    Positions and distances are computed in float32 at least, also for parameters in half precision, which is coarser
    than the distance between two elements of a large kernel. Kernels with many pairs of a point and an element are
    sampled in chunks, unless scripted; PyTorch refuses chunks within the transforms of torch.func.

    Args:
        coords: ``(..., P, d)``.
        radius: ``(..., P)``.
        weights: ``(..., C, P)``.
        kernel_size: d sizes.
        normalize: Whether to divide by ``|N(x)|``, see :func:`evaluate_points`.

    Returns:
        ``(..., C, *kernel_size)`` in the dtype of ``weights``.
    """
    if has_torch_function_variadic(coords, radius, weights):
        return handle_torch_function(
            sample_kernel, (coords, radius, weights), coords, radius, weights, kernel_size, normalize)
    dtype = torch.float64 if coords.dtype == torch.float64 else torch.float32
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript compiles the second condition of an "and")
        if exceeds_budget(math.prod(kernel_size), coords):
            query = sampling_grid(kernel_size, device=coords.device, dtype=dtype)
            return _evaluate_in_chunks(query, coords, radius, weights, normalize).unflatten(-1, kernel_size)
    g = _normalize(_grid_tents(kernel_size, coords, radius, dtype), normalize)
    return _weighted_sum(weights, g).unflatten(-1, kernel_size)


def resample_kernel(
        coords: Tensor, radius: Tensor, weights: Tensor, base_size: List[int], kernel_size: List[int],
        normalize: bool = False) -> Tensor:
    """Sample the kernel of ``base_size`` on another grid, with the same response to a constant input. A leaf for fx.

    Every point keeps the sum of its tent over the grid. On a coarser grid the radii grow by as much as a point may be
    farther from the nearest element. A tent that would still fall between the elements is widened to the nearest one.

    Arguments, result and numerics are those of :func:`sample_kernel`; ``weights`` are for the kernel of ``base_size``.
    """
    if has_torch_function_variadic(coords, radius, weights):
        return handle_torch_function(
            resample_kernel, (coords, radius, weights), coords, radius, weights, base_size, kernel_size, normalize)
    dtype = torch.float64 if coords.dtype == torch.float64 else torch.float32
    wider = max(_max_grid_distance(kernel_size) - _max_grid_distance(base_size), 0.)
    support = torch.maximum(radius.to(dtype) + wider, 1.001 * _grid_distance(coords.to(dtype), kernel_size) + 1e-6)
    base = tent_mass(sampling_grid(base_size, device=coords.device, dtype=dtype), coords, radius, normalize)
    mass = tent_mass(sampling_grid(kernel_size, device=coords.device, dtype=dtype), coords, support, normalize)
    scaled = weights.to(dtype) * (base / mass.clamp_min(1e-6)).unsqueeze(-2)
    return sample_kernel(coords, support, scaled, kernel_size, normalize).to(weights.dtype)


def tent_mass(query: Tensor, coords: Tensor, radius: Tensor, normalize: bool) -> Tensor:
    """Sum each point's tent over the queries, ``(..., P)``: its share of the function's sum for a weight of 1."""
    if not torch.jit.is_scripting():  # noqa: SIM102 (as in sample_kernel)
        if query.ndim == 2 and exceeds_budget(query.shape[0], coords):
            return _tent_mass_in_chunks(query, coords, radius, normalize)
    return _tent_mass(query, coords, radius, normalize)


def _tent_mass(query: Tensor, coords: Tensor, radius: Tensor, normalize: bool) -> Tensor:
    return _normalize(tent_basis(query, coords, radius), normalize).sum(-1)


def _max_grid_distance(kernel_size: List[int]) -> float:
    """Return how far in L1 a point may be from the nearest element of a grid: half a spacing in each axis."""
    distance = 0.
    for size in kernel_size:
        distance += 1 / max(size - 1, 1)
    return distance


def _grid_distance(coords: Tensor, kernel_size: List[int]) -> Tensor:
    """Return the L1 distance of each point from the nearest element of a grid, ``(..., P)``."""
    distance = torch.zeros_like(coords[..., 0])
    for axis in range(len(kernel_size)):
        half = (kernel_size[len(kernel_size) - 1 - axis] - 1) / 2
        position = coords[..., axis]
        nearest = ((position.clamp(-1., 1.) + 1) * half).round() / half - 1 if half > 0 else torch.zeros_like(position)
        distance = distance + (position - nearest).abs()
    return distance


def clip_radius(radius: Tensor, low: float, high: float) -> Tensor:
    """Clamp the radius to [low, high] in the forward pass, with the gradient of the identity. A leaf function for fx.

    A plain clamp has no gradient outside of the range, so a radius that an optimizer moved there could not return.
    Infinite radii are clamped without a gradient; NaN stays NaN, so that it is noticed.
    """
    if has_torch_function_unary(radius):
        return handle_torch_function(clip_radius, (radius,), radius, low, high)
    clipped = radius.clamp(low, high).detach()
    largest = 65504. if radius.dtype == torch.float16 else 3.38e38
    radius = F.hardtanh(radius, -largest, largest)  # not nan_to_num, whose backward pass is five kernels
    return clipped + (radius - radius.detach())


# --- long kernels in chunks ---


def exceeds_budget(num_queries: int, coords: Tensor) -> bool:
    """Return whether the pairs of points ``(..., P, d)`` and queries are too many to hold at once."""
    return _num_points(coords) * num_queries > _MAX_PAIRS


def _num_points(coords: Tensor) -> int:
    return coords.numel() // max(coords.shape[-1], 1)


def _evaluate_in_chunks(query: Tensor, coords: Tensor, radius: Tensor, weights: Tensor, normalize: bool) -> Tensor:
    """Compute ``evaluate_points(query, coords, radius, weights, normalize)`` for a grid ``(Q, d)``."""
    sets = torch.broadcast_shapes(coords.shape[:-2], radius.shape[:-1], weights.shape[:-2])
    weights = weights.expand(*sets, *weights.shape[-2:])
    values = []
    for chunk, index, *overlapping in _chunks(query, coords, radius):
        of_these = weights.take_along_dim(index.expand(*sets, -1).unsqueeze(-2), -1)
        values.append(_checkpointed(evaluate_points, chunk, *overlapping, of_these, normalize))
    return torch.cat(values, -1)


def _tent_mass_in_chunks(query: Tensor, coords: Tensor, radius: Tensor, normalize: bool) -> Tensor:
    sets = torch.broadcast_shapes(coords.shape[:-1], radius.shape)
    total = torch.zeros(sets, dtype=torch.promote_types(query.dtype, radius.dtype), device=coords.device)
    for chunk, index, *overlapping in _chunks(query, coords, radius):
        total = total.scatter_add(-1, index, _checkpointed(_tent_mass, chunk, *overlapping, normalize))
    return total


def _chunks(query: Tensor, coords: Tensor, radius: Tensor) -> Iterator[Tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield chunks of the queries, indices of the points that overlap them, and these points' coords and radii."""
    sets = torch.broadcast_shapes(coords.shape[:-2], radius.shape[:-1])
    coords, radius = coords.expand(*sets, -1, -1), radius.expand(*sets, -1)
    for chunk in query.split(max(_MAX_PAIRS // 4 // max(_num_points(coords), 1), 1)):
        index = _overlapping_points(chunk, coords, radius)
        yield chunk, index, coords.take_along_dim(index.unsqueeze(-1), -2), radius.take_along_dim(index, -1)


@torch.no_grad()
def _overlapping_points(chunk: Tensor, coords: Tensor, radius: Tensor) -> Tensor:
    """Return indices ``(..., n)`` of the points whose tents overlap the box of these queries.

    Every set of points gets the n of the fullest set; the surplus points have no effect. A compiled graph cannot depend
    on values, and tensors on the meta device have none: both get all points.
    """
    if coords.is_meta or torch.compiler.is_compiling():
        return torch.arange(coords.shape[-2], device=coords.device).expand(coords.shape[:-1])
    low, high = chunk.amin(0), chunk.amax(0)
    distance = ((low - coords).relu() + (coords - high).relu()).sum(-1)
    overlaps = ~(distance >= radius)  # true for NaN, so that it is noticed
    most = int(overlaps.sum(-1).max())
    return torch.sort(overlaps.to(torch.uint8), dim=-1, descending=True, stable=True).indices[..., :most]


def _checkpointed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    if is_exporting() or not torch.is_grad_enabled():  # nothing is kept; strict export cannot trace checkpoint
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
