"""The depthwise convolution whose kernel is sampled from points."""
import pytest
import torch
import torch.nn.functional as F
from common import randomize_
from torch import nn

from smpconv_models import checkpoint
from smpconv_models.layers import SMPDepthwiseConv2d, clip_radius_


@pytest.mark.parametrize('dilation', [1, 2])
@pytest.mark.parametrize('kernel_size', [1, 5, 17])
def test_forward_is_a_convolution_with_its_kernel(kernel_size, dilation):
    layer = randomize_(SMPDepthwiseConv2d(4, kernel_size, 9, dilation, dtype=torch.float64))
    x = torch.randn(2, 4, 8, 11, dtype=torch.float64)
    expected = F.conv2d(x, layer.kernel(), padding='same', dilation=dilation, groups=4)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_radius_out_of_range_is_clipped_in_the_forward_pass():
    layer = randomize_(SMPDepthwiseConv2d(3, 7, 3))
    with torch.no_grad():
        layer.radius.copy_(torch.tensor([1e8, -5., 0.5]))
    kernel = layer.kernel()
    assert layer.radius.tolist() == [1e8, -5., 0.5]
    with torch.no_grad():
        layer.radius.copy_(torch.tensor([1., 1e-3, 0.5]))
    assert torch.equal(layer.kernel(), kernel)


def test_clip_radius_clips_the_parameters_and_leaves_the_coordinates():
    layer = SMPDepthwiseConv2d(3, 7, 4, radius_range=(0.01, 0.5))
    parameter = layer.radius
    with torch.no_grad():
        layer.radius.copy_(torch.tensor([1e8, -5., 0.25, 0.]))
        layer.coords.fill_(3.)
    clip_radius_(nn.Sequential(nn.ReLU(), layer))
    assert layer.radius is parameter and parameter.requires_grad
    torch.testing.assert_close(parameter.detach(), torch.tensor([0.5, 0.01, 0.25, 0.01]), rtol=0, atol=0)
    assert (layer.coords == 3).all()


def test_parameters_and_shapes():
    layer = SMPDepthwiseConv2d(4, 9, 20, device='meta', dtype=torch.bfloat16)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {'weight': (4, 20), 'coords': (20, 2), 'radius': (20,)}
    assert all(value.is_meta and value.dtype == torch.bfloat16 for value in layer.parameters())
    assert layer(torch.empty(2, 4, 5, 6, device='meta', dtype=torch.bfloat16)).shape == (2, 4, 5, 6)


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(kernel_size=4), 'kernel size must be odd and positive, got 4'),
    (dict(kernel_size=-1), 'kernel size must be odd and positive, got -1'),
    (dict(num_points=0), 'num_points must be a positive whole number, got 0'),
])
def test_errors(changes, message):
    with pytest.raises(ValueError) as error:
        SMPDepthwiseConv2d(**dict(dict(channels=2, kernel_size=3, num_points=2), **changes))
    assert str(error.value) == message


def test_kernel_of_the_release(golden):
    data = golden('smp_depthwise_k13')
    layer = SMPDepthwiseConv2d(6, 13, 42)
    layer.load_state_dict({
        'coords': data['weight_coord'][0], 'radius': data['radius'].flatten(), 'weight': data['weights'][0]})
    torch.testing.assert_close(layer.kernel()[:, 0], data['kernel'], rtol=1e-5, atol=1e-6)


def test_a_state_dict_is_for_its_kernel_size(tmp_path):
    """The number of points does not tell the size; a dictionary without PyTorch's metadata is loaded unchecked."""
    small, resized, large = (SMPDepthwiseConv2d(2, size, 9) for size in (5, 5, 9))
    resized.resize(9)
    torch.save(small.state_dict(), tmp_path / 'small.pt')
    stored = torch.load(tmp_path / 'small.pt', weights_only=True)
    for state_dict in (small.state_dict(), resized.state_dict(), stored):
        with pytest.raises(RuntimeError, match='the points of the layer are for kernels of size 5, not of 9'):
            large.load_state_dict(state_dict)
        assert list(state_dict) == ['weight', 'coords', 'radius']
    resized.load_state_dict(stored)
    large.load_state_dict(dict(stored))


def test_a_checkpoint_is_for_its_kernel_size():
    small, large = (nn.Sequential(SMPDepthwiseConv2d(2, size, 9)) for size in (5, 9))
    content = {'state_dict': small.state_dict()}
    assert checkpoint.describe_mismatch(checkpoint.select_state_dict(content)[0], small) is None
    state_dict, _ = checkpoint.select_state_dict(content)
    message = 'the points of 0 are for kernels of size 5, not of 9'
    assert checkpoint.describe_mismatch(state_dict, large) == message
    state_dict._metadata['0']['base_size'] = 'x' * 1000
    assert len(checkpoint.describe_mismatch(state_dict, large)) < 200
