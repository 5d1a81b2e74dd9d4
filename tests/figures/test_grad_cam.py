"""Heat maps of images."""
import numpy as np
import pytest
import torch
from common import randomize_
from PIL import Image
from timm.utils import reparameterize_model
from torch import nn

from smpconv_models import SMPConvNet, figures


@pytest.fixture(scope='module')
def network():
    return randomize_(SMPConvNet(
        depths=(1, 1), dims=(4, 8), kernel_sizes=(7, 5), num_classes=3, stem_stride=2)).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('method', ['GradCAM', 'GradCAMPlusPlus', 'XGradCAM', 'HiResCAM', 'LayerCAM', 'EigenGradCAM'])
def test_maps_have_the_size_of_the_images(network, images, method):
    each = [figures.heat_maps(network, images, 'stem', [index] * 2, method) for index in range(3)]
    assert all(maps.shape == (2, 24, 40) and maps.dtype == np.float32 for maps in each)
    assert all(maps.min() >= 0 and maps.max() <= 1 for maps in each)
    assert max(maps.std() for maps in each) > 0.01  # at least one class is supported
    assert all(parameter.grad is None for parameter in network.parameters())


class Bright(nn.Module):
    """Class 0 is bright, class 1 is dark."""
    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(1, 2, 1, bias=False)
        with torch.no_grad():
            self.features.weight.copy_(torch.tensor([1., -1.])[:, None, None, None])

    def forward(self, x):
        return self.features(x).relu().mean((2, 3))


def test_the_map_is_where_the_class_is():
    image = torch.zeros(1, 1, 16, 16)
    image[..., :8], image[..., 8:] = 2., -1.
    network = Bright().eval().requires_grad_(False)  # a frozen network too
    bright = figures.heat_maps(network, image, 'features')
    dark = figures.heat_maps(network, image, 'features', classes=[1])
    assert bright[0, :, :8].min() > 0.99 and bright[0, :, 8:].max() < 0.01
    assert dark[0, :, 8:].min() > 0.99 and dark[0, :, :8].max() < 0.01


def test_defaults_are_the_last_stage_and_the_predicted_class(network, images):
    maps = figures.heat_maps(network, images)
    predicted = network(images).argmax(1).tolist()
    np.testing.assert_array_equal(maps, figures.heat_maps(network, images, 'stages.1', predicted))
    other = [(index + 1) % 3 for index in predicted]
    assert abs(maps - figures.heat_maps(network, images, 'stages.1', other)).max() > 0.1


def test_reparameterized_networks_have_the_same_maps(network, images):
    maps = figures.heat_maps(network, images)
    np.testing.assert_allclose(figures.heat_maps(reparameterize_model(network), images), maps, atol=1e-3)


@pytest.mark.parametrize(('options', 'message'), [
    (dict(layer='stages.2'), r"no layer is named 'stages.2'; the nearest names are \['stages"),
    (dict(layer='head.fc'), 'head.fc has no feature maps'),
    (dict(classes=[0]), 'a class for each of 2 images, got 1'),
    (dict(classes=[0, 3]), r'class must lie in \[0, 2\], got 3'),
    (dict(method='Guess'), "one of .* got 'Guess'"),
])
def test_invalid_arguments_are_refused(network, images, options, message):
    with pytest.raises(ValueError, match=message):
        figures.heat_maps(network, images, **options)


@pytest.mark.parametrize(('change', 'message'), [
    (lambda network, images: (network.train(), images), 'evaluation mode'),
    (lambda network, images: (network, images[:, :1]), r'cannot take images of \(1, 24, 40\)'),
    (lambda network, images: (network, images[:0]), 'at least one image'),
    (lambda network, images: (network, images * torch.nan), 'not finite'),
    (lambda network, images: (network.stem, images), r'a classifier with logits of shape \(N, classes\)'),
    (lambda network, images: (nn.Sequential(nn.Flatten(), nn.Linear(2880, 2)).eval(), images), 'name a layer'),
], ids=['training', 'channels', 'no image', 'nan', 'no logits', 'no stages'])
def test_networks_and_images_without_maps_are_refused(images, change, message):
    network = SMPConvNet(depths=(1, 1), dims=(4, 8), kernel_sizes=(7, 5), num_classes=3).eval()
    network, images = change(network, images)
    with pytest.raises(ValueError, match=message):
        figures.heat_maps(network, images)


def test_the_plot(tmp_path):
    maps = np.linspace(0, 1, 3 * 6 * 8, dtype='float32').reshape(3, 6, 8)
    figures.save_heat_maps(tmp_path / 'heat.png', torch.rand(3, 1, 6, 8), maps, ['a', '$b$', 'c'], columns=2)
    assert np.asarray(Image.open(tmp_path / 'heat.png').convert('RGB')).std((0, 1)).min() > 10
    with pytest.raises(ValueError, match='as many images as maps and titles'):
        figures.save_heat_maps(tmp_path / 'none.png', torch.rand(3, 1, 6, 8), maps, ['a'])
