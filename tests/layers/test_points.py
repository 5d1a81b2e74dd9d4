"""The representation: tents, evaluation, grid, kernels at once and in chunks, clipped radii, initial distributions."""

import math

import pytest
import torch
from common import randomize_

from smpconv_models.layers import (
    SMPConv1d,
    SMPConv2d,
    SMPDepthwiseConv2d,
    clip_radius,
    evaluate_points,
    points,
    sample_kernel,
    sampling_grid,
    tent_basis,
)


def loop_tents(query, coords, radius):
    """Equation 2 element by element, ``(P, Q)``."""
    g = torch.zeros(len(coords), len(query), dtype=torch.float64)
    for p, (point, r) in enumerate(zip(coords.tolist(), radius.tolist())):
        for q, x in enumerate(query.tolist()):
            g[p, q] = max(0., 1 - sum(abs(a - b) for a, b in zip(x, point)) / r)
    return g


def loop_evaluate(query, coords, radius, weights, normalize, eps=1e-6):
    """Equation 1 element by element, ``(C, Q)``."""
    g = loop_tents(query, coords, radius).tolist()
    out = torch.zeros(len(weights), len(query), dtype=torch.float64)
    for c, values in enumerate(weights.tolist()):
        for q in range(len(query)):
            total = sum(value * g[p][q] for p, value in enumerate(values))
            reached = sum(g[p][q] > 0 for p in range(len(values)))
            out[c, q] = total / (reached + eps) if normalize else total
    return out


def make(ndim, num_points=5, num_queries=7, channels=3, leading=()):
    """Points that overlap, and a query outside of all radii."""
    query = torch.rand(*leading, num_queries, ndim, dtype=torch.float64) * 2 - 1
    query[..., 0, :] = 9
    coords = torch.rand(*leading, num_points, ndim, dtype=torch.float64) * 2 - 1
    radius = torch.rand(*leading, num_points, dtype=torch.float64) * ndim + 0.2
    weights = torch.randn(*leading, channels, num_points, dtype=torch.float64)
    return query, coords, radius, weights


@pytest.mark.parametrize('ndim', [1, 2, 3])
def test_tents_equal_scalar_loops(ndim):
    query, coords, radius, _ = make(ndim)
    got = tent_basis(query, coords, radius)
    assert (got == 0).any() and (got > 0).any()
    torch.testing.assert_close(got, loop_tents(query, coords, radius), rtol=0, atol=1e-14)


@pytest.mark.parametrize('normalize', [False, True])
@pytest.mark.parametrize('ndim', [1, 2, 3])
def test_evaluate_points_equals_scalar_loops(ndim, normalize):
    query, coords, radius, weights = make(ndim)
    got = evaluate_points(query, coords, radius, weights, normalize=normalize)
    assert torch.equal(got[:, 0], torch.zeros(3, dtype=torch.float64))  # outside of all radii
    torch.testing.assert_close(
        got, loop_evaluate(query, coords, radius, weights, normalize), rtol=0, atol=1e-14)


@pytest.mark.parametrize('normalize', [False, True])
@pytest.mark.parametrize('ndim', [1, 2, 3])
def test_gradcheck(ndim, normalize):
    """Every argument has its derivative; the random values lie off the kinks."""
    arguments = [tensor.requires_grad_() for tensor in make(ndim, num_queries=4, num_points=3)]
    assert torch.autograd.gradcheck(
        lambda *args: evaluate_points(*args, normalize=normalize), arguments)


def test_leading_dimensions_broadcast():
    """One query grid, several sets of points, each with its own radii and weights."""
    query = make(2)[0]
    _, coords, radius, weights = make(2, leading=(4, 2))
    got = evaluate_points(query, coords, radius, weights)
    assert got.shape == (4, 2, 3, 7)
    for i in range(4):
        for j in range(2):
            torch.testing.assert_close(
                got[i, j], loop_evaluate(query, coords[i, j], radius[i, j], weights[i, j], True),
                rtol=0, atol=1e-14)


def test_one_set_of_points_broadcasts_to_many_weights():
    query, coords, radius, _ = make(2)
    weights = torch.randn(6, 3, 5, dtype=torch.float64)
    got = evaluate_points(query, coords, radius, weights)
    for values, kernel in zip(weights, got):
        torch.testing.assert_close(kernel, evaluate_points(query, coords, radius, values))


@pytest.mark.parametrize(('size', 'expected'), [
    ([3], [[-1], [0], [1]]), ([1, 1], [[0, 0]]), ([1, 3], [[-1, 0], [0, 0], [1, 0]]),
    ([2, 3], [[-1, 1], [0, 1], [1, 1], [-1, -1], [0, -1], [1, -1]]),
    ([2, 2, 2], [[x, y, z] for z in (1, -1) for y in (1, -1) for x in (-1, 1)]),
])
def test_grid_is_cartesian(size, expected):
    """Row-major over the kernel: x to the right, y up, so the first row is the top one. A size of 1 lies at zero."""
    assert sampling_grid(size).tolist() == expected


@pytest.mark.parametrize('size', [3, 13, 31, 51])
def test_grid_is_symmetric_and_ends_at_one(size):
    """Exactly: a shift of half an element would show in every kernel."""
    axis = sampling_grid([size])[:, 0]
    assert axis[0] == -1 and axis[-1] == 1 and axis[size // 2] == 0
    assert torch.equal(axis, -axis.flip(0))


def test_grid_takes_dtype_and_device():
    grid = sampling_grid([3, 3], device=torch.device('meta'), dtype=torch.float64)
    assert (grid.device.type, grid.dtype) == ('meta', torch.float64)
    assert sampling_grid([3]).dtype == torch.float32


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('size', [[7], [1, 1], [5, 5], [3, 8], [2, 3, 4], [3, 3, 5]], ids=str)
def test_a_kernel_is_the_points_on_the_grid(size, dtype):
    """The same bits by distances along the axes; the gradients are summed in another order."""
    generator = torch.Generator().manual_seed(0)
    coords, radius, weights = parameters = [
        tensor.to(dtype).requires_grad_() for tensor in (
            torch.rand(2, 6, len(size), generator=generator) * 2.2 - 1.1, torch.rand(2, 6, generator=generator) + 0.1,
            torch.randn(2, 3, 6, generator=generator))]
    expected = evaluate_points(sampling_grid(size), coords, radius, weights, normalize=True).unflatten(-1, size)
    got = sample_kernel(coords, radius, weights, size)
    assert torch.equal(got, expected)
    grad = torch.randn(got.shape, generator=generator).to(dtype)
    for ours, theirs in zip(*(torch.autograd.grad(kernel, parameters, grad) for kernel in (got, expected))):
        torch.testing.assert_close(ours, theirs, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)


def test_a_point_sets_the_element_at_its_position():
    kernel = sample_kernel(
        torch.tensor([[1., 1.]]), torch.tensor([0.1]), torch.tensor([[2.]]), [3, 5], normalize=False)
    expected = torch.zeros(1, 3, 5)
    expected[0, 0, 4] = 2  # right and up
    assert torch.equal(kernel, expected)


@pytest.mark.parametrize('normalize', [False, True])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_kernel_is_float32s_rounded(dtype, normalize):
    """Of the same half-precision parameters: only the result is rounded, not the positions."""
    coords = (torch.rand(40, 2) * 2 - 1).to(dtype)
    radius = (torch.rand(40) * 0.3 + 0.05).to(dtype)
    weights = torch.randn(3, 40).to(dtype)
    kernel = sample_kernel(coords, radius, weights, [31, 31], normalize)
    expected = sample_kernel(coords.float(), radius.float(), weights.float(), [31, 31], normalize)
    assert kernel.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert ((kernel.float() - expected).abs() <= eps * expected.abs() + eps * 2 ** -7).all()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_clipped_radius_is_exactly_in_range(dtype):
    radius = torch.tensor([6e4, 1.0001, 1., 0.5, 0.3, 1e-3, 1e-4, 0., -5., -7., -6e4], dtype=dtype)
    clipped = clip_radius(radius, 1e-3, 1.)
    assert clipped.dtype == dtype
    assert torch.equal(clipped, radius.clamp(1e-3, 1.))


def test_clipped_radius_passes_every_gradient():
    """A plain clamp would keep a radius out of range."""
    radius = torch.tensor([1e8, 2., 0.5, 0., -5.], requires_grad=True)
    grad = torch.randn(5)
    assert torch.equal(torch.autograd.grad(clip_radius(radius, 1e-3, 1.), radius, grad)[0], grad)


def test_clip_radius_clamps_infinities_and_keeps_nan():
    radius = torch.tensor([float('inf'), float('-inf'), float('nan')])
    high, low, undefined = clip_radius(radius, 1e-3, 1.).tolist()
    assert (high, low) == (1., pytest.approx(1e-3)) and undefined != undefined


def test_initial_coords():
    coords = SMPDepthwiseConv2d(1, 31, 20000).coords  # with the paper's std for its ImageNet models
    assert coords.abs().max() <= 1
    assert abs(coords.mean()) < 5 * 0.2 / math.sqrt(40000)
    assert abs(coords.std() - 0.2) < 5 * 0.2 / math.sqrt(2 * 40000)  # the cut at five std changes nothing


def test_initial_coords_are_cut_off():
    coords = SMPConv2d(1, 20, 31, 1000, coords_std=3.).coords
    assert coords.min() >= -1 and coords.max() <= 1
    assert coords.min() < -0.99 and coords.max() > 0.99


def test_initial_causal_coords():
    """Half a normal with its peak at 1, stretched from (-1, 0) to (-1, 1)."""
    coords = SMPConv1d(1, 20, 31, 1000, coords_std=0.1).coords
    assert coords.min() >= -1 and coords.max() <= 1
    distance = 1 - coords
    assert abs(distance.mean() - 0.2 * math.sqrt(2 / math.pi)) < 5 * 0.12 / math.sqrt(20000)
    assert abs(distance.square().mean().sqrt() - 0.2) < 5 * 0.2 / math.sqrt(2 * 20000)


@pytest.mark.parametrize(('layer', 'expected'), [
    (SMPDepthwiseConv2d(5, 31, 4), 4 / 31), (SMPConv2d(5, 5, 31, 4), 4 / 31), (SMPConv1d(5, 5, 100, 4), 2 / 100),
    (SMPConv1d(5, 5, 100, 4, init_radius=0.25), 0.25)])
def test_initial_radius(layer, expected):
    assert torch.equal(layer.radius, torch.full_like(layer.radius, expected))


def test_initial_weights():
    weights = SMPDepthwiseConv2d(100, 31, 200).weight
    assert abs(weights.std() - 0.02) < 5 * 0.02 / math.sqrt(2 * 20000)
    assert abs(weights.mean()) < 5 * 0.02 / math.sqrt(20000)


# --- long kernels in chunks ---

KERNELS = {'1-D': ((), [97]), 'filters, 1-D': ((4,), [97]), 'filters, 2-D': ((3,), [12, 15]), '3-D': ((2,), [5, 6, 7])}


def make_for_grid(leading, size, num_points=9, in_channels=2):
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    coords = uniform(*leading, num_points, len(size)) * 2.4 - 1.2
    radius = uniform(*leading, num_points) * 0.3 * len(size) + 0.02
    return [tensor.requires_grad_() for tensor in (coords, radius, uniform(*leading, in_channels, num_points) - 0.5)]


@pytest.fixture
def few_pairs(monkeypatch):
    """Chunks of a few elements even for small kernels."""
    monkeypatch.setattr(points, '_MAX_PAIRS', 400)


@pytest.mark.parametrize('normalize', [False, True])
@pytest.mark.parametrize('kind', KERNELS)
def test_chunks_equal_sampling_at_once(few_pairs, kind, normalize):
    leading, size = KERNELS[kind]
    parameters = make_for_grid(leading, size)
    query = sampling_grid(size, dtype=torch.float64)
    assert points.exceeds_budget(len(query), parameters[0])
    expected = evaluate_points(query, *parameters, normalize).unflatten(-1, size)
    got = points.sample_kernel(*parameters, size, normalize)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-15)
    grad = torch.randn(got.shape, dtype=torch.float64)
    gradients = (torch.autograd.grad(kernel, parameters, grad) for kernel in (got, expected))
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('normalize', [False, True])
def test_sums_equal_those_at_once(few_pairs, normalize):
    coords, radius, _ = make_for_grid((3,), [60])
    query = sampling_grid([60], dtype=torch.float64)
    got = points.tent_mass(query, coords, radius, normalize)
    expected = points._tent_mass(query, coords, radius, normalize)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    for ours, theirs in zip(torch.autograd.grad(got.sin().sum(), (coords, radius)),
                            torch.autograd.grad(expected.sin().sum(), (coords, radius))):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_one_set_of_points_for_many_weights(few_pairs):
    coords, radius, _ = make_for_grid((), [80])
    weights = torch.randn(5, 3, 9, dtype=torch.float64)
    query = sampling_grid([80], dtype=torch.float64)
    got = points._evaluate_in_chunks(query, coords, radius, weights, True)
    torch.testing.assert_close(got, evaluate_points(query, coords, radius, weights, True), rtol=0, atol=1e-15)


def test_points_outside_of_the_grid_leave_zeros(few_pairs):
    layer = SMPConv1d(2, 3, 200, num_points=4)
    with torch.no_grad():
        layer.coords.fill_(9.)
    kernel = layer.kernel()
    assert kernel.shape == (3, 2, 200) and not kernel.any()
    kernel.sum().backward()
    assert not layer.weight.grad.any()


def test_small_kernels_are_sampled_at_once():
    layer = SMPDepthwiseConv2d(4, 51, 51 ** 2 // 8)
    assert not points.exceeds_budget(51 ** 2, layer.coords)


def test_chunks_are_compiled_in_one_graph(few_pairs):
    """Which points overlap a chunk depends on values, on which a graph cannot depend."""
    layer = SMPConv1d(2, 3, 12, num_points=5)
    compiled = torch.compile(layer, fullgraph=True, backend='aot_eager')
    x = torch.randn(2, 2, 12)
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert layer.coords.grad.any()


@pytest.mark.parametrize('radius', [0.0002, 0.3])
def test_pairs_are_never_held_at_once(radius, monkeypatch):
    """No tensor of forward or backward pass is as large as points x elements x filters, at any radius."""
    filters, num_points, length = 6, 30, 16000
    layer = SMPConv1d(2, filters, length, num_points, init_radius=radius)
    monkeypatch.setattr(points, '_MAX_PAIRS', 1 << 19)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with Watch():
        layer.kernel().square().sum().backward()
    assert layer.radius.grad is not None
    assert filters * 2 * length <= largest < filters * num_points * length / 4


@pytest.mark.parametrize('name', ['coords', 'radius'])
def test_nan_is_noticed(few_pairs, name):
    layer = SMPConv1d(1, 2, 80, num_points=6)
    with torch.no_grad():
        getattr(layer, name)[0, 2] = torch.nan
    kernel = layer.kernel()
    assert kernel[0].isnan().all() and kernel[1].isfinite().all()


@pytest.mark.parametrize(('coords', 'radius'), [((9, 1), (4, 9)), ((4, 9, 1), (9,))])
def test_coords_and_radii_broadcast(few_pairs, coords, radius):
    coords, radius = torch.rand(coords, dtype=torch.float64) - 0.5, torch.rand(radius, dtype=torch.float64)
    weights = torch.randn(4, 2, 9, dtype=torch.float64)
    expected = evaluate_points(sampling_grid([70], dtype=torch.float64), coords, radius, weights)
    torch.testing.assert_close(points.sample_kernel(coords, radius, weights, [70]), expected, rtol=0, atol=1e-15)


def test_nothing_of_the_pairs_is_kept(monkeypatch):
    """The backward pass recomputes what it needs."""
    layer = SMPConv1d(2, 6, 16000, 30, init_radius=0.3)
    monkeypatch.setattr(points, '_MAX_PAIRS', 1 << 19)
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer.kernel()
    assert sum(kept.values()) < 6 * 30 * 16000 * 4 / 20


@pytest.mark.parametrize('strict', [True, False])
def test_chunks_are_exported(monkeypatch, strict):
    monkeypatch.setattr(points, '_MAX_PAIRS', 1000)
    layer, x = randomize_(SMPConv1d(2, 3, 60, num_points=6)), torch.randn(1, 2, 60)
    assert points.exceeds_budget(60, layer.coords)
    torch.testing.assert_close(torch.export.export(layer, (x,), strict=strict).module()(x), layer(x))
