"""Long kernels drawn a chunk at a time, so that points times elements are never held at once.

A kernel of 16,000 steps with 30 filters of 30 points has 14 million pairs of a point and an element, and the gradient
needs several numbers of each. But tents are local. So the elements are cut into chunks, each chunk takes only the
points that reach into it, and what a chunk computed is computed again in the backward pass instead of being kept.
"""
from typing import Any, Callable, Tuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from smpconv_models.ops import is_exporting

# Pairs of a point and an element that may be held at once: 16 MB in float32, a few times that in the backward pass.
# Chunks have a quarter of them; smaller ones spare more points, but each costs a millisecond.
_MOST_PAIRS = 1 << 22


def are_many(query: Tensor, coords: Tensor) -> bool:
    """Whether there are too many pairs of points ``(..., P, d)`` and queries ``(Q, d)`` to hold them at once."""
    return query.ndim == 2 and _pairs_of_query(coords) * query.shape[0] > _MOST_PAIRS


def _pairs_of_query(coords: Tensor) -> int:
    return coords.numel() // max(coords.shape[-1], 1)


def interpolate_in_chunks(
        evaluate_points: Callable[..., Tensor],
        query: Tensor,
        coords: Tensor,
        radius: Tensor,
        weights: Tensor,
        normalize: bool,
) -> Tensor:
    """``evaluate_points(query, coords, radius, weights, normalize)`` of :mod:`.points`, chunk by chunk.

    Args:
        interpolate: The function.
        query: ``(Q, d)``, neighbours next to each other, as a grid in row-major order has them.
        coords: ``(..., P, d)``.
        radius: ``(..., P)``.
        weights: ``(..., C, P)``.
        normalize: Passed on.

    Returns:
        ``(..., C, Q)``.
    """
    coords, radius = _together(coords, radius)
    sets = torch.broadcast_shapes(coords.shape[:-2], weights.shape[:-2])
    weights = weights.expand(*sets, *weights.shape[-2:])
    drawn = []
    for chunk in _cut(query, coords):
        index = _reaching(chunk, coords, radius)
        of_these = weights.take_along_dim(index.expand(*sets, -1).unsqueeze(-2), -1)
        drawn.append(_recomputed(evaluate_points, chunk, *_take(index, coords, radius), of_these, normalize))
    return torch.cat(drawn, -1)


def sum_in_chunks(
        point_sums: Callable[..., Tensor],
        query: Tensor,
        coords: Tensor,
        radius: Tensor,
        normalize: bool,
) -> Tensor:
    """``point_sums(query, coords, radius, normalize)`` of :mod:`.points`, chunk by chunk; ``(..., P)``."""
    coords, radius = _together(coords, radius)
    total = torch.zeros_like(coords[..., 0], dtype=torch.promote_types(query.dtype, radius.dtype))
    for chunk in _cut(query, coords):
        index = _reaching(chunk, coords, radius)
        total = total.scatter_add(-1, index, _recomputed(point_sums, chunk, *_take(index, coords, radius), normalize))
    return total


def _together(coords: Tensor, radius: Tensor) -> Tuple[Tensor, Tensor]:
    """Places and radii of the same sets of points."""
    sets = torch.broadcast_shapes(coords.shape[:-2], radius.shape[:-1])
    return coords.expand(*sets, -1, -1), radius.expand(*sets, -1)


def _cut(query: Tensor, coords: Tensor) -> Tuple[Tensor, ...]:
    return query.split(max(_MOST_PAIRS // 4 // max(_pairs_of_query(coords), 1), 1))


def _recomputed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    if is_exporting() or not torch.is_grad_enabled():  # nothing is kept, and strict export can't
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


@torch.no_grad()
def _reaching(chunk: Tensor, coords: Tensor, radius: Tensor) -> Tensor:
    """Indices ``(..., n)`` of the points whose tents reach into the box of these queries.

    As many for each set of points as the fullest has: those that are too many have no effect. A compiled graph can't
    depend on the values, and tensors on the meta device have none: these take all.
    """
    if coords.is_meta or torch.compiler.is_compiling():
        return torch.arange(coords.shape[-2], device=coords.device).expand(coords.shape[:-1])
    low, high = chunk.amin(0), chunk.amax(0)
    distance = ((low - coords).relu() + (coords - high).relu()).sum(-1)
    reaches = ~(distance >= radius)  # NaN does, so that it is seen
    most = int(reaches.sum(-1).max())
    return torch.sort(reaches.to(torch.uint8), dim=-1, descending=True, stable=True).indices[..., :most]


def _take(index: Tensor, coords: Tensor, radius: Tensor) -> Tuple[Tensor, Tensor]:
    return coords.take_along_dim(index.unsqueeze(-1), -2), radius.take_along_dim(index, -1)
