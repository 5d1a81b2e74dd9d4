"""Kernels drawn from the same points at other sizes."""
import pytest
import timm
import torch
from common import randomize_
from timm.utils import reparameterize_model

import smpconv_models
from smpconv_models.layers import LargeKernelConv, SMPDepthwiseConv2d, points, smp_layers

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
        def tent(grid, reach, p=p):
            return (1 - (grid - coords[p]).abs().sum(-1) / reach).clamp_min(0)

        drawn = tent(new, radius[p] + wider)
        kernel += weights[:, p, None] * drawn * tent(old, radius[p]).sum() / drawn.sum()
    return kernel.view(-1, size, size)


@pytest.mark.parametrize('size', [9, 25, 31, 5])
def test_every_point_keeps_its_sum(size):
    layer = randomize_(SMPDepthwiseConv2d(3, 13, 20, dtype=torch.float64))
    coords, radius, weights = layer.coords.detach(), layer.radius.detach(), layer.weight.detach()
    kernel = points.resample_kernel(coords, radius, weights, [13, 13], [size, size])
    torch.testing.assert_close(kernel, loop_kernel(coords, radius, weights, 13, size))
    torch.testing.assert_close(kernel.sum((1, 2)), layer.kernel().detach().sum((1, 2, 3)))


def test_the_same_size_is_the_same_kernel():
    layer = randomize_(SMPDepthwiseConv2d(3, 13, 20, dtype=torch.float64))
    kernel = points.resample_kernel(layer.coords, layer.radius, layer.weight, [13, 13], [13, 13])
    torch.testing.assert_close(kernel, layer.kernel().squeeze(1))


def test_a_finer_kernel_is_the_same_function():
    """Twice as many intervals: each other element lies where one lay before, at a quarter of its weight or about it."""
    coords, radius = torch.tensor([[0.21, -0.13]]), torch.tensor([0.9])
    fine = points.resample_kernel(coords, radius, torch.ones(1, 1), [31, 31], [61, 61])
    coarse = points.sample_kernel(coords, radius, torch.ones(1, 1), [31, 31], normalize=False)
    torch.testing.assert_close(fine[:, ::2, ::2] * 4, coarse, rtol=0.01, atol=0.01)


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


def test_gradients_at_another_size():
    layer = randomize_(SMPDepthwiseConv2d(2, 5, 4, dtype=torch.float64))
    layer.resize(9)
    x = torch.randn(1, 2, 6, 7, dtype=torch.float64)

    def function(weight, coords, radius):
        return torch.func.functional_call(layer, {'weight': weight, 'coords': coords, 'radius': radius}, (x,))
    assert torch.autograd.gradcheck(function, tuple(layer.parameters()))


def test_what_cannot_be_drawn_is_refused():
    layer = SMPDepthwiseConv2d(2, 5, 4)
    with pytest.raises(ValueError, match='kernel size must be odd and positive, got 6'):
        layer.resize(6)
    with pytest.raises(ValueError, match=r'must be scaled to at least 5 elements, got 3 \(scale 0.2\)'):
        LargeKernelConv(2, 11, 4).rescale(0.2)


def test_repr_tells_both_sizes():
    layer = SMPDepthwiseConv2d(2, 5, 4)
    assert 'base_size' not in repr(layer)
    layer.resize(9)
    assert 'kernel_size=9, base_size=5' in repr(layer)


# --- models ---


def test_scale_draws_other_sizes_from_the_same_parameters():
    model, fine = make(), make(kernel_scale=2)
    assert sizes(model) == [15, 9, 9] and sizes(fine) == [29, 17, 17]
    assert sizes(make(kernel_scale=(2, 1))) == [29, 9, 9] and sizes(make(kernel_scale=1.5)) == [21, 13, 13]
    fine.load_state_dict(model.state_dict())
    fine.set_kernel_scale(1)
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(fine.eval()(image), model.eval()(image))


def test_a_scaled_model_traces_scripts_and_reparameterizes():
    model, image = randomize_(make(kernel_scale=2)).eval(), torch.randn(2, 3, 40, 36)
    expected = model(image)
    torch.testing.assert_close(torch.jit.script(model)(image), expected)
    torch.testing.assert_close(torch.compile(model, backend='aot_eager', fullgraph=True)(image), expected)
    plain = reparameterize_model(model)
    torch.testing.assert_close(plain(image), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match='needs the points, and these kernels are drawn'):
        plain.set_kernel_scale(1)


@pytest.mark.parametrize('scale, told', [
    ((1, 2, 3), r'kernel_scale must have one entry for each of 2 stages, got \(1, 2, 3\)'),
    (0.1, 'a kernel of 15 must be scaled to at least 5 elements, got 3'),
])
def test_scales_that_do_not_fit_are_refused(scale, told):
    with pytest.raises(ValueError, match=told):
        make(kernel_scale=scale)


# --- pretrained weights ---


@pytest.fixture
def file(tmp_path):
    model = randomize_(timm.create_model('smpconv_nano', **SMALL))
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    return tmp_path / 'model.pth'


def pretrained(file, **kwargs):
    overlay = dict(file=str(file), num_classes=3)
    return timm.create_model('smpconv_nano', pretrained=True, pretrained_cfg_overlay=overlay, **{**SMALL, **kwargs})


def test_weights_are_drawn_at_the_sizes_asked_for(file):
    image = torch.randn(1, 3, 48, 48)
    scaled = pretrained(file, kernel_scale=2).eval()(image)
    assert not torch.equal(scaled, pretrained(file).eval()(image))
    sized = pretrained(file, kernel_sizes=(29, 17))
    assert sizes(sized) == [29, 17, 17] and torch.equal(sized.eval()(image), scaled)
    assert sizes(pretrained(file, kernel_sizes=(13, 11))) == [13, 11, 11]
    features = pretrained(file, kernel_sizes=(29, 17), features_only=True)
    assert sizes(features) == [29, 17, 17]


def test_one_point_for_nine_elements_has_its_size_too(tmp_path):
    """Kernels whose points are not a quarter of their elements."""
    model = timm.create_model('smpconv_mobile31', depths=(1, 1), dims=(4, 6), kernel_sizes=(31, 51), num_classes=3)
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    sized = timm.create_model(
        'smpconv_mobile31', pretrained=True, depths=(1, 1), dims=(4, 6), kernel_sizes=(61, 101), num_classes=3,
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'model.pth'), num_classes=3))
    assert sizes(sized) == [61, 101] and [layer.base_size for layer in smp_layers(sized).values()] == [31, 51]


@pytest.mark.parametrize('kwargs, told', [
    (dict(kernel_sizes=(28, 17)), 'kernel size must be odd and positive, got 28'),
    (dict(kernel_sizes=(29, 17), kernel_scale=2), 'contradict kernel_scale'),
    (dict(kernel_sizes=(29, 17, 5)), 'depths, dims and kernel_sizes must have one entry'),
    (dict(points_divisor=9), 'the checkpoint does not fit the model'),
])
def test_what_fits_no_weights_is_refused(file, kwargs, told):
    with pytest.raises(ValueError, match=told):
        pretrained(file, **kwargs)


def test_without_pretrained_weights_sizes_are_the_points_own():
    """A network to train has as many points as its kernels ask for."""
    model = timm.create_model('smpconv_nano', **{**SMALL, 'kernel_sizes': (29, 17)})
    assert [len(layer.coords) for layer in smp_layers(model).values()] == [29 * 29 // 4, 17 * 17 // 4, 17 * 17 // 4]
