"""Kernels sampled from the same points at other sizes."""
import pytest
import timm
import torch
from common import randomize_, released
from timm.utils import reparameterize_model

import smpconv_models
from smpconv_models.layers import ReparamLargeKernelConv, SMPDepthwiseConv2d, points, smp_layers

SMALL = dict(depths=(1, 2), dims=(4, 6), kernel_sizes=(15, 9), num_classes=3)


def make(**kwargs):
    return smpconv_models.SMPConvNet(**{**SMALL, **kwargs})


def sizes(model):
    return [layer.kernel_size for layer in smp_layers(model).values()]


# --- the function ---


def loop_kernel(coords, radius, weights, base, size):
    """Point by point, of a 2-D kernel."""
    old, new = (points.sampling_grid([side, side], dtype=torch.float64) for side in (base, size))
    wider = max(2 / (size - 1) - 2 / (base - 1), 0.)  # half a spacing in each of two axes, coarser over finer
    kernel = torch.zeros(len(weights), size * size, dtype=torch.float64)
    for p in range(len(coords)):
        def tent(grid, support, p=p):
            return (1 - (grid - coords[p]).abs().sum(-1) / support).clamp_min(0)

        nearest = (new - coords[p]).abs().sum(-1).min()
        sampled = tent(new, max(radius[p] + wider, 1.001 * nearest + 1e-6))
        kernel += weights[:, p, None] * sampled * tent(old, radius[p]).sum() / sampled.sum()
    return kernel.view(-1, size, size)


@pytest.mark.parametrize('size', [9, 13, 25, 31, 5])
def test_every_point_keeps_its_sum(size):
    layer = randomize_(SMPDepthwiseConv2d(3, 13, 20, dtype=torch.float64))
    coords, radius, weights = layer.coords.detach(), layer.radius.detach(), layer.weight.detach()
    kernel = points.resample_kernel(coords, radius, weights, [13, 13], [size, size])
    torch.testing.assert_close(kernel, loop_kernel(coords, radius, weights, 13, size))
    torch.testing.assert_close(kernel.sum((1, 2)), layer.kernel().detach().sum((1, 2, 3)))


@pytest.mark.parametrize('base, size', [(31, 41), (31, 61), (13, 11), (31, 7), (5, 9)])
@pytest.mark.parametrize('radius', [1e-3, 0.01, 0.03, 0.1])
def test_small_radii_do_not_fall_between_the_elements(base, size, radius):
    generator = torch.Generator().manual_seed(0)
    coords = torch.empty(500, 2, dtype=torch.float64).uniform_(-1.1, 1.1, generator=generator)
    coords[:25] = points.sampling_grid([base, base], dtype=torch.float64)[torch.linspace(0, base ** 2 - 1, 25).long()]
    radii, weights = torch.full((500,), radius, dtype=torch.float64), torch.eye(500, dtype=torch.float64)
    old = points.sample_kernel(coords, radii, weights, [base, base], normalize=False).sum((1, 2))
    new = points.resample_kernel(coords, radii, weights, [base, base], [size, size]).sum((1, 2))
    assert (old > 0).sum() >= 25
    torch.testing.assert_close(new, old)


def test_half_precision_is_sampled_in_single():
    layer = randomize_(SMPDepthwiseConv2d(3, 31, 100))
    layer.resize(51)
    expected = layer.kernel()
    half = layer.half().kernel()
    assert half.dtype == torch.float16
    assert (half.float() - expected).abs().max() < 4e-3 * expected.abs().max()


def test_resetting_keeps_the_first_size():
    layer = SMPDepthwiseConv2d(3, 13, 20)
    radius = layer.radius.detach().clone()
    layer.resize(25)
    layer.reset_parameters()
    assert torch.equal(layer.radius, radius)


# --- layers ---


def test_a_constant_image_gets_the_same_response():
    layer = randomize_(SMPDepthwiseConv2d(4, 15, 50, dtype=torch.float64))
    image = torch.ones(1, 4, 90, 90, dtype=torch.float64)
    expected = layer(image)[0, :, 45, 45]
    for size in (3, 7, 13, 17, 29, 61):
        layer.resize(size)
        assert layer.kernel().shape[-1] == size
        torch.testing.assert_close(layer(image)[0, :, 45, 45], expected)
    layer.resize(15)
    torch.testing.assert_close(layer(image)[0, :, 45, 45], expected, rtol=0, atol=0)


@pytest.mark.parametrize('size', [5, 9])
def test_every_parameter_has_a_gradient(size):
    layer = randomize_(SMPDepthwiseConv2d(2, 5, 4, dtype=torch.float64))
    layer.resize(size)
    x = torch.randn(1, 2, 6, 7, dtype=torch.float64)

    def function(weight, coords, radius):
        return torch.func.functional_call(layer, {'weight': weight, 'coords': coords, 'radius': radius}, (x,))
    parameters = tuple(layer.parameters())
    assert torch.autograd.gradcheck(function, parameters)
    assert all(grad.any() for grad in torch.autograd.grad(layer(x).square().sum(), parameters))


def test_invalid_sizes_are_refused():
    layer = SMPDepthwiseConv2d(2, 5, 4)
    with pytest.raises(ValueError, match='kernel size must be odd and positive, got 6'):
        layer.resize(6)
    with pytest.raises(ValueError, match=r'a kernel of 11 must be scaled to 5 to 4095 elements, got 3 \(scale 0.2\)'):
        ReparamLargeKernelConv(2, 11, 4).scaled_size(0.2)


def test_repr_names_the_sizes_and_the_backend():
    layer = SMPDepthwiseConv2d(4, 9, 20, dilation=2, backend='reference')
    assert repr(layer) == "SMPDepthwiseConv2d(4, kernel_size=9, num_points=20, dilation=2, backend='reference')"
    layer.resize(11)
    assert 'kernel_size=11, base_size=9' in repr(layer)


# --- models ---


def test_scale_samples_other_sizes_from_the_same_parameters():
    model, fine = make(), make(kernel_scale=2)
    assert sizes(model) == [15, 9, 9] and sizes(fine) == [29, 17, 17]
    assert sizes(make(kernel_scale=(2, 1))) == [29, 9, 9] and sizes(make(kernel_scale=1.5)) == [21, 13, 13]
    fine.load_state_dict(model.state_dict())
    fine.set_kernel_scale(1)
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(fine.eval()(image), model.eval()(image))


@pytest.mark.slow  # 13 s of compiling
def test_a_scaled_model_traces_scripts_and_reparameterizes():
    model, image = randomize_(make(kernel_scale=2)).eval(), torch.randn(2, 3, 40, 36)
    expected = model(image)
    torch.testing.assert_close(torch.jit.script(model)(image), expected)
    torch.testing.assert_close(torch.compile(model, backend='aot_eager', fullgraph=True)(image), expected)
    plain = reparameterize_model(model)
    torch.testing.assert_close(plain(image), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match='cannot be changed: the model is re-parameterized'):
        plain.set_kernel_scale(1)


@pytest.mark.parametrize('scale, message', [
    ((1, 2, 3), r'kernel_scale must have one entry for each of 2 stages, got \(1, 2, 3\)'),
    (0.1, 'a kernel of 15 must be scaled to 5 to 4095 elements, got 3'),
    (1e9, 'must be scaled to 5 to 4095 elements'),
    ((2, 0.1), 'a kernel of 9 must be scaled to 5 to 4095 elements, got 1'),
    (0, 'must be scaled by a positive number, got 0'), (-1, 'got -1'), (float('nan'), 'got nan'),
    (float('inf'), 'got inf'), ('abc', "must be scaled by a positive number, got 'abc'"), (None, 'got None'),
    ((2, 'a'), "got 'a'"),
])
def test_scales_that_do_not_fit_are_refused(scale, message):
    with pytest.raises(ValueError, match=message):
        make(kernel_scale=scale)
    model = make()
    with pytest.raises(ValueError, match=message):
        model.set_kernel_scale(scale)
    assert sizes(model) == [15, 9, 9]  # none of them is changed


def test_stages_without_blocks():
    model = make(depths=(1, 0))
    model.set_kernel_scale(2)
    assert sizes(model) == [29]


def test_reparameterized_kernels_beside_other_norms_cannot_be_scaled():
    with pytest.raises(ValueError, match='cannot be changed: the model is re-parameterized'):
        reparameterize_model(make(norm_layer='layernorm2d').eval()).set_kernel_scale(1)


def test_a_dilated_model_is_scaled():
    model = make(depths=(1, 1, 1), dims=(4, 6, 8), kernel_sizes=(15, 9, 7), output_stride=8, kernel_scale=2)
    assert [layer.dilation for layer in smp_layers(model).values()] == [1, 1, 2]
    layer = list(smp_layers(model).values())[-1].double()
    same = SMPDepthwiseConv2d(8, 7, len(layer.coords), dtype=torch.float64)
    same.load_state_dict(layer.state_dict())
    same.resize(13)
    x = torch.randn(1, 8, 20, 22, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[..., ::2, ::2], same(x[..., ::2, ::2]))


# --- pretrained weights ---


@pytest.fixture
def file(tmp_path):
    model = randomize_(timm.create_model('smpconv_nano', **SMALL))
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    return tmp_path / 'model.pth'


def pretrained(file, **kwargs):
    overlay = dict(file=str(file), num_classes=3)
    return timm.create_model('smpconv_nano', pretrained=True, pretrained_cfg_overlay=overlay, **{**SMALL, **kwargs})


def test_weights_are_sampled_at_the_given_sizes(file):
    image = torch.randn(1, 3, 48, 48)
    scaled = pretrained(file, kernel_scale=2).eval()(image)
    assert not torch.equal(scaled, pretrained(file).eval()(image))
    sized = pretrained(file, kernel_sizes=(29, 17))
    assert sizes(sized) == [29, 17, 17] and torch.equal(sized.eval()(image), scaled)
    assert sizes(pretrained(file, kernel_sizes=(13, 11))) == [13, 11, 11]
    features = pretrained(file, kernel_sizes=(29, 17), features_only=True)
    assert sizes(features) == [29, 17, 17]


def test_one_point_for_nine_elements_has_its_size_too(tmp_path):
    """A divisor of the number of points other than 4."""
    model = timm.create_model('smpconv_mobile31', depths=(1, 1), dims=(4, 6), kernel_sizes=(31, 51), num_classes=3)
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    sized = timm.create_model(
        'smpconv_mobile31', pretrained=True, depths=(1, 1), dims=(4, 6), kernel_sizes=(61, 101), num_classes=3,
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'model.pth'), num_classes=3))
    assert sizes(sized) == [61, 101] and [layer.base_size for layer in smp_layers(sized).values()] == [31, 51]


def test_nothing_is_resampled_unasked(file, tmp_path):
    """Neither by a variant's own sizes nor for another variant's weights."""
    other = timm.create_model('smpconv_nano', kernel_sizes=(11, 9, 7, 5), num_classes=3)
    torch.save(other.state_dict(), tmp_path / 'other.pth')
    overlay = dict(file=str(tmp_path / 'other.pth'), num_classes=3)
    with pytest.raises(ValueError, match='does not fit the model'):
        timm.create_model('smpconv_nano', pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay)
    asked = timm.create_model(
        'smpconv_nano', pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay, kernel_sizes=(21, 9, 7, 5))
    assert [(layer.base_size, layer.kernel_size) for layer in smp_layers(asked).values()][:2] == [(11, 21), (9, 9)]


def test_the_models_own_size_comes_before_a_smaller_one_with_as_many_points(tmp_path):
    kwargs = dict(depths=(1,), dims=(4,), points_divisor=25, num_classes=3, small_kernel_size=0)  # 7x7 and 5x5: 1 point
    torch.save(timm.create_model('smpconv_nano', kernel_sizes=(7,), **kwargs).state_dict(), tmp_path / 'model.pth')
    same = timm.create_model('smpconv_nano', kernel_sizes=(7,), pretrained=True, **kwargs, pretrained_cfg_overlay=dict(
        file=str(tmp_path / 'model.pth'), num_classes=3))
    assert [(layer.base_size, layer.kernel_size) for layer in smp_layers(same).values()] == [(7, 7)]


def test_the_releases_weights_at_other_sizes(golden, tmp_path):
    torch.save(released(golden('imagenet_tiny')), tmp_path / 'release.pth')
    sized = timm.create_model(
        'smpconv_t', pretrained=True, depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), kernel_sizes=(25, 11, 9, 7),
        num_classes=10, pretrained_cfg_overlay=dict(file=str(tmp_path / 'release.pth'), num_classes=10))
    assert [(layer.base_size, layer.kernel_size) for layer in smp_layers(sized).values()][:2] == [(13, 25), (11, 11)]


@pytest.mark.parametrize('kwargs, message', [
    (dict(kernel_sizes=(28, 17)), 'kernel size must be odd and positive, got 28'),
    (dict(kernel_sizes=(29, 17), kernel_scale=2), 'contradict kernel_scale'),
    (dict(kernel_sizes=(29, 17, 5)), 'depths, dims and kernel_sizes must have one entry'),
    (dict(points_divisor=9), 'the checkpoint does not fit the model'),
])
def test_what_fits_no_weights_is_refused(file, kwargs, message):
    with pytest.raises(ValueError, match=message):
        pretrained(file, **kwargs)


def test_without_pretrained_weights_sizes_are_the_points_own():
    """A network to train has as many points as its kernels ask for."""
    model = timm.create_model('smpconv_nano', **{**SMALL, 'kernel_sizes': (29, 17)})
    assert [len(layer.coords) for layer in smp_layers(model).values()] == [29 * 29 // 4, 17 * 17 // 4, 17 * 17 // 4]
