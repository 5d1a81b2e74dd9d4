"""The representation: tents, interpolation, grid, drawn kernels, clipped radii, initial distributions."""
import math

import pytest
import torch

from smpconv_models.layers import clip_radius, evaluate_points, points, sample_kernel, sampling_grid, tent_basis


def loop_tents(query, coords, radius):
    """Equation 2 element by element, ``(P, Q)``."""
    g = torch.zeros(len(coords), len(query), dtype=torch.float64)
    for p, (point, r) in enumerate(zip(coords.tolist(), radius.tolist())):
        for q, x in enumerate(query.tolist()):
            g[p, q] = max(0., 1 - sum(abs(a - b) for a, b in zip(x, point)) / r)
    return g


def loop_interpolate(query, coords, radius, weights, normalize, eps=1e-6):
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
    """Points that overlap, and a query out of all points' reach."""
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


def test_tent_is_one_on_its_point_and_zero_from_its_radius_on():
    query = torch.tensor([[0.25, 0.], [0.5, 0.], [0.25, 0.25], [0.75, 0.], [1., 1.]])
    g = tent_basis(query, torch.tensor([[0.25, 0.]]), torch.tensor([0.5]))
    assert g.tolist() == [[1., 0.5, 0.5, 0., 0.]]


@pytest.mark.parametrize('normalize', [False, True])
@pytest.mark.parametrize('ndim', [1, 2, 3])
def test_interpolate_equals_scalar_loops(ndim, normalize):
    query, coords, radius, weights = make(ndim)
    got = evaluate_points(query, coords, radius, weights, normalize=normalize)
    assert torch.equal(got[:, 0], torch.zeros(3, dtype=torch.float64))  # out of reach
    torch.testing.assert_close(
        got, loop_interpolate(query, coords, radius, weights, normalize), rtol=0, atol=1e-14)


def test_interpolate_normalizes_unless_told():
    arguments = make(2)
    assert torch.equal(evaluate_points(*arguments), evaluate_points(*arguments, normalize=True))


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
                got[i, j], loop_interpolate(query, coords[i, j], radius[i, j], weights[i, j], True),
                rtol=0, atol=1e-14)


def test_one_set_of_points_broadcasts_to_many_weights():
    query, coords, radius, _ = make(2)
    weights = torch.randn(6, 3, 5, dtype=torch.float64)
    got = evaluate_points(query, coords, radius, weights)
    for values, kernel in zip(weights, got):
        torch.testing.assert_close(kernel, evaluate_points(query, coords, radius, values))


def test_grid_is_cartesian():
    """Row-major over the kernel: x to the right, y up, so the first row is the top one."""
    expected = [
        [-1., 1.], [0., 1.], [1., 1.],
        [-1., -1.], [0., -1.], [1., -1.],
    ]
    assert sampling_grid([2, 3]).tolist() == expected


def test_grid_in_one_and_three_dimensions():
    assert sampling_grid([3]).tolist() == [[-1.], [0.], [1.]]
    grid = sampling_grid([2, 2, 3])  # z against the first axis, y against the second, x along the last
    assert grid.shape == (12, 3)
    assert grid[0].tolist() == [-1., 1., 1.]
    assert grid[1].tolist() == [0., 1., 1.]
    assert grid[3].tolist() == [-1., -1., 1.]
    assert grid[6].tolist() == [-1., 1., -1.]


def test_grid_of_size_one_lies_at_zero():
    assert sampling_grid([1, 1]).tolist() == [[0., 0.]]
    assert sampling_grid([1, 3]).tolist() == [[-1., 0.], [0., 0.], [1., 0.]]


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


def test_a_point_lights_the_element_it_lies_on():
    kernel = sample_kernel(
        torch.tensor([[1., 1.]]), torch.tensor([0.1]), torch.tensor([[2.]]), [3, 5], normalize=False)
    expected = torch.zeros(1, 3, 5)
    expected[0, 0, 4] = 2  # right and up
    assert torch.equal(kernel, expected)


def test_kernel_of_the_release_with_shared_points(golden):
    """The original code's output in float32; two orders of summing differ by far less than 1e-5."""
    data = golden('smp_depthwise_k13')
    kernel = sample_kernel(
        data['weight_coord'][0], data['radius'].flatten(), data['weights'][0], [13, 13], normalize=False)
    torch.testing.assert_close(kernel, data['kernel'], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(('name', 'kernel_size'), [('smp_filter_1d', [41]), ('smp_filter_2d', [11, 11])])
def test_kernel_of_the_release_with_points_per_filter(golden, name, kernel_size):
    data = golden(name)
    kernel = sample_kernel(
        data['weight_coord'], data['radius'].flatten(1), data['weights'], kernel_size, normalize=True)
    torch.testing.assert_close(kernel, data['kernel'], rtol=1e-5, atol=1e-6)


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


def test_kernel_scripts_and_is_one_fx_leaf():
    arguments = [tensor.float() for tensor in make(2)[1:]]

    class Kernel(torch.nn.Module):
        def forward(self, coords, radius, weights):
            return sample_kernel(coords, radius, weights, [5, 3], False)
    expected = sample_kernel(*arguments, [5, 3], False)
    assert torch.equal(torch.jit.script(Kernel())(*arguments), expected)
    traced = torch.fx.symbolic_trace(Kernel())
    assert sum(node.op == 'call_function' for node in traced.graph.nodes) == 1
    assert torch.equal(traced(*arguments), expected)


@pytest.mark.parametrize('value', [1e8, 1.0001, 1., 0.5, 1e-3, 1e-4, 0., -5., -1e8])
def test_clipped_radius_is_exactly_in_range(value):
    radius = torch.tensor([value])
    assert torch.equal(clip_radius(radius, 1e-3, 1.), radius.clamp(1e-3, 1.))


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_clipped_radius_in_other_dtypes(dtype):
    radius = torch.tensor([6e4, 0.3, -7.], dtype=dtype)
    clipped = clip_radius(radius, 1e-3, 1.)
    assert clipped.dtype == dtype
    assert torch.equal(clipped, radius.clamp(1e-3, 1.))


def test_clipped_radius_passes_every_gradient():
    """A plain clamp would leave a radius out of range where it is."""
    radius = torch.tensor([1e8, 2., 0.5, 0., -5.], requires_grad=True)
    grad = torch.randn(5)
    assert torch.equal(torch.autograd.grad(clip_radius(radius, 1e-3, 1.), radius, grad)[0], grad)


def test_clip_radius_holds_infinities_and_shows_nan():
    radius = torch.tensor([float('inf'), float('-inf'), float('nan')])
    high, low, undefined = clip_radius(radius, 1e-3, 1.).tolist()
    assert (high, low) == (1., pytest.approx(1e-3)) and undefined != undefined


def test_initial_coords():
    coords = points.init_coords_(torch.empty(20000, 2), std=0.2)
    assert coords.abs().max() <= 1
    assert abs(coords.mean()) < 5 * 0.2 / math.sqrt(40000)
    assert abs(coords.std() - 0.2) < 5 * 0.2 / math.sqrt(2 * 40000)  # the cut at five std changes nothing


def test_initial_coords_are_cut_off():
    coords = points.init_coords_(torch.empty(20000), std=1., low=-0.5, high=0.25)
    assert coords.min() >= -0.5 and coords.max() <= 0.25
    assert coords.min() < -0.49 and coords.max() > 0.24


def test_initial_causal_coords():
    """Half a normal with its peak at 1, stretched from (-1, 0) to (-1, 1)."""
    coords = points.init_causal_coords_(torch.empty(20000), std=0.1)
    assert coords.min() >= -1 and coords.max() <= 1
    distance = 1 - coords
    assert abs(distance.mean() - 0.2 * math.sqrt(2 / math.pi)) < 5 * 0.12 / math.sqrt(20000)
    assert abs(distance.square().mean().sqrt() - 0.2) < 5 * 0.2 / math.sqrt(2 * 20000)


@pytest.mark.parametrize(('kernel_size', 'ndim', 'expected'), [(31, 2, 4 / 31), (100, 1, 2 / 100), (7, 3, 6 / 7)])
def test_initial_radius(kernel_size, ndim, expected):
    radius = torch.nn.Parameter(torch.empty(5))
    points.init_radius_(radius, kernel_size, ndim)
    assert torch.equal(radius, torch.full((5,), expected))


def test_initial_weights():
    weights = points.init_weights_(torch.empty(100, 200))
    assert abs(weights.std() - 0.02) < 5 * 0.02 / math.sqrt(2 * 20000)
    assert abs(weights.mean()) < 5 * 0.02 / math.sqrt(20000)
