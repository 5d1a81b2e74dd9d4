"""Self-moving point representations: a continuous function as points that carry weights and reach a radius.

Pure functions for any number of dimensions. Shapes: P points, d coordinates, C channels, Q queries, ``...`` any
leading dimensions, broadcast against each other.

Kim & Park, SMPConv: Self-moving Point Representations for Continuous Convolution, CVPR 2023, section 3.1.
"""
from typing import List, Optional

import torch
from torch import Tensor
from torch.nn.init import trunc_normal_
from torch.overrides import handle_torch_function, has_torch_function_unary, has_torch_function_variadic

from . import chunked


def tent_basis(query: Tensor, coords: Tensor, radius: Tensor) -> Tensor:
    """Equation 2, cut off at zero: ``relu(1 - |x - p|_1 / r)``.

    Args:
        query: ``(..., Q, d)``, where to evaluate.
        coords: ``(..., P, d)``, the points' positions.
        radius: ``(..., P)``, positive.

    Returns:
        ``(..., P, Q)``: 1 on a point, falling linearly to 0 at its radius, 0 beyond. In the widest of the dtypes.
    """
    # one coordinate at a time: d is 1 to 3, and a (..., P, Q, d) tensor costs more than the loop
    distance = (coords[..., 0].unsqueeze(-1) - query[..., 0].unsqueeze(-2)).abs()
    for axis in range(1, coords.shape[-1]):
        distance = distance + (coords[..., axis].unsqueeze(-1) - query[..., axis].unsqueeze(-2)).abs()
    return (1 - distance / radius.unsqueeze(-1)).relu()


def evaluate_points(
        query: Tensor,
        coords: Tensor,
        radius: Tensor,
        weights: Tensor,
        normalize: bool = True,
        eps: float = 1e-6,
) -> Tensor:
    """Equation 1: the function's value at each query, from the points whose tents reach it.

    Differentiable in ``coords``, ``radius`` and ``weights`` (and ``query``), almost everywhere.

    Args:
        query: ``(..., Q, d)``.
        coords: ``(..., P, d)``.
        radius: ``(..., P)``, positive; see :func:`clip_radius`.
        weights: ``(..., C, P)``, each point's value in each channel.
        normalize: Divide by the number of points that reach the query, |N(x)|, as equation 1 does. The ImageNet
            models do without.
        eps: Added to that number, so that queries out of all points' reach get 0.

    Returns:
        ``(..., C, Q)`` in the dtype of ``weights``. Computed in the widest of the dtypes; under autocast the product
        of weights and tents is in autocast's.
    """
    g = tent_basis(query, coords, radius)
    if normalize:
        g = g / ((g > 0).sum(dim=-2, keepdim=True, dtype=g.dtype) + eps)
    return (weights.to(g.dtype) @ g).to(weights.dtype)


def sampling_grid(
        kernel_size: List[int],
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
) -> Tensor:
    """Where the elements of a kernel lie in the space of the points: evenly over [-1, 1] in each dimension.

    Coordinates are Cartesian: the first grows along the kernel's last axis (x, to the right), every other one
    against its axis (y, up the rows), so that the kernel needs no transposing or flipping afterwards.

    Args:
        kernel_size: Elements along each axis of the kernel tensor, e.g. ``[height, width]``.
        device: Where to make it.
        dtype: Of the coordinates, float32 by default.

    Returns:
        ``(Q, d)``, the kernel's elements in row-major order. An axis of size 1 lies at 0.
    """
    axes: List[Tensor] = []
    for axis, size in enumerate(kernel_size):
        steps = torch.arange(size, device=device, dtype=dtype if dtype is not None else torch.float32)
        position = (2 * steps - (size - 1)) / max(size - 1, 1)
        axes.append(position if axis == len(kernel_size) - 1 else -position)
    grid = torch.meshgrid(axes, indexing='ij')
    return torch.stack([grid[axis].flatten() for axis in range(len(grid) - 1, -1, -1)], dim=-1)


def sample_kernel(
        coords: Tensor,
        radius: Tensor,
        weights: Tensor,
        kernel_size: List[int],
        normalize: bool = True,
) -> Tensor:
    """Draws the kernel: :func:`evaluate_points` on :func:`sampling_grid`. One leaf for fx.

    Positions and distances are computed in float32 at least, whatever the parameters' dtype: half precision is
    coarser than the distance between two elements of a large kernel. Where points times elements are many (a kernel of
    16,000 steps), they are never held at once, neither here nor in the backward pass: see :mod:`.chunks`. (Scripted,
    they are; and the transforms of torch.func don't take kernels drawn in chunks, as PyTorch says then.)

    Args:
        coords: ``(..., P, d)``.
        radius: ``(..., P)``.
        weights: ``(..., C, P)``.
        kernel_size: d sizes.
        normalize: As in :func:`evaluate_points`.

    Returns:
        ``(..., C, *kernel_size)`` in the dtype of ``weights``.
    """
    if has_torch_function_variadic(coords, radius, weights):
        return handle_torch_function(
            sample_kernel, (coords, radius, weights), coords, radius, weights, kernel_size, normalize)
    dtype = torch.float64 if coords.dtype == torch.float64 else torch.float32
    query = sampling_grid(kernel_size, device=coords.device, dtype=dtype)
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript compiles the second condition of an "and")
        if chunked.are_many(query, coords):
            kernel = chunked.interpolate_in_chunks(evaluate_points, query, coords, radius, weights, normalize)
            return kernel.unflatten(-1, kernel_size)
    kernel = evaluate_points(query, coords, radius, weights, normalize)
    return kernel.unflatten(-1, kernel_size)


def resample_kernel(
        coords: Tensor,
        radius: Tensor,
        weights: Tensor,
        base_size: List[int],
        kernel_size: List[int],
        normalize: bool = False,
) -> Tensor:
    """Draws the kernel of ``base_size`` on another grid, with the same response to a constant input. One leaf for fx.

    Every point keeps the sum of its tent over the grid. On a coarser grid the tents are wider by as much as a point may
    be farther from the nearest element; and one that would still fall between the elements reaches the nearest.

    Args:
        coords: ``(..., P, d)``.
        radius: ``(..., P)``.
        weights: ``(..., C, P)``, for the kernel of ``base_size``.
        base_size: d sizes.
        kernel_size: d sizes of the kernel to draw.
        normalize: As in :func:`evaluate_points`; a point's sum is then that of its tent over |N(x)|.

    Returns:
        ``(..., C, *kernel_size)`` in the dtype of ``weights``; positions and sums in float32 at least.
    """
    if has_torch_function_variadic(coords, radius, weights):
        return handle_torch_function(
            resample_kernel, (coords, radius, weights), coords, radius, weights, base_size, kernel_size, normalize)
    dtype = torch.float64 if coords.dtype == torch.float64 else torch.float32
    wider = max(_farthest(kernel_size) - _farthest(base_size), 0.)
    reach = torch.maximum(radius.to(dtype) + wider, 1.001 * _distance(coords.to(dtype), kernel_size) + 1e-6)
    base = _sums(sampling_grid(base_size, device=coords.device, dtype=dtype), coords, radius, normalize)
    now = _sums(sampling_grid(kernel_size, device=coords.device, dtype=dtype), coords, reach, normalize)
    scaled = weights.to(dtype) * (base / now.clamp_min(1e-6)).unsqueeze(-2)
    return sample_kernel(coords, reach, scaled, kernel_size, normalize).to(weights.dtype)


def point_sums(query: Tensor, coords: Tensor, radius: Tensor, normalize: bool) -> Tensor:
    """Sum of each point's tent over the queries, ``(..., P)``: its share of the function's sum for a weight of 1."""
    g = tent_basis(query, coords, radius)
    if normalize:
        g = g / ((g > 0).sum(dim=-2, keepdim=True, dtype=g.dtype) + 1e-6)
    return g.sum(-1)


def _sums(query: Tensor, coords: Tensor, radius: Tensor, normalize: bool) -> Tensor:
    if not torch.jit.is_scripting():  # noqa: SIM102 (as in sample_kernel)
        if chunked.are_many(query, coords):
            return chunked.sum_in_chunks(point_sums, query, coords, radius, normalize)
    return point_sums(query, coords, radius, normalize)


def _farthest(kernel_size: List[int]) -> float:
    """How far in L1 a point may be from the nearest element of a grid: half a spacing in each axis."""
    distance = 0.
    for size in kernel_size:
        distance += 1 / max(size - 1, 1)
    return distance


def _distance(coords: Tensor, kernel_size: List[int]) -> Tensor:
    """L1 distance of each point from the nearest element of a grid, of shape ``(..., P)``."""
    distance = torch.zeros_like(coords[..., 0])
    for axis in range(len(kernel_size)):
        half = (kernel_size[len(kernel_size) - 1 - axis] - 1) / 2
        position = coords[..., axis]
        nearest = ((position.clamp(-1., 1.) + 1) * half).round() / half - 1 if half > 0 else torch.zeros_like(position)
        distance = distance + (position - nearest).abs()
    return distance


def clip_radius(radius: Tensor, low: float, high: float) -> Tensor:
    """The radius held in [low, high] in the forward pass, with the gradient of the identity. One leaf for fx.

    A plain clamp would cut the gradient of a radius that an optimizer has carried out of the range, and leave it there.
    Infinite radii are held without a gradient; NaN stays NaN, so that it is seen.
    """
    if has_torch_function_unary(radius):
        return handle_torch_function(clip_radius, (radius,), radius, low, high)
    radius = radius.nan_to_num(nan=float('nan'), posinf=high, neginf=low)
    return radius.clamp(low, high).detach() + (radius - radius.detach())


def init_coords_(coords: Tensor, std: float, low: float = -1., high: float = 1.) -> Tensor:
    """Fills ``coords`` from a zero-mean normal cut off at [low, high]; the points start near the middle.

    The paper takes std 0.2 for the ImageNet models (appendix A.2), 0.05 for its other 2-D kernels (A.1).
    """
    return trunc_normal_(coords, std=std, a=low, b=high)


def init_causal_coords_(coords: Tensor, std: float = 0.1) -> Tensor:
    """Fills the coordinates of a causal 1-D kernel: half a normal that ends at the present, position 1.

    Drawn in (-1, 0) with ``std``, then stretched to (-1, 1) (appendix A.1).
    """
    with torch.no_grad():
        return trunc_normal_(coords, std=std, a=-1., b=0.).mul_(2).add_(1)


def init_radius_(radius: Tensor, kernel_size: int, ndim: int) -> Tensor:
    """Fills ``radius`` with ``2 d / k``: about the distance of two kernel elements in L1 (appendix A.1)."""
    with torch.no_grad():
        return radius.fill_(2 * ndim / kernel_size)


def init_weights_(weights: Tensor, std: float = 0.02) -> Tensor:
    """Fills the points' weights from a zero-mean normal cut off at [-2, 2]."""
    return trunc_normal_(weights, std=std, a=-2., b=2.)
