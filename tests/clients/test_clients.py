"""Libraries that use backbones by timm's names: their unchanged classes on the models of this package."""
import functools
import warnings

import pytest
import timm
import torch
from common import randomize_
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.detection.backbone_utils import BackboneWithFPN

import smpconv_models
from smpconv_models import hub
from smpconv_models.layers import smp_layers

effdet = pytest.importorskip('effdet')
segmentation_models_pytorch = pytest.importorskip('segmentation_models_pytorch')
transformers = pytest.importorskip('transformers')


def nano(**kwargs):
    return randomize_(timm.create_model('smpconv_nano', **kwargs))


def learns(model, loss_function, steps=6):
    """Return whether the loss of a generated problem falls; the points of every kernel must have gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = loss_function()
        optimizer.zero_grad()
        loss.backward()
        points = [parameter for layer in smp_layers(model).values() for parameter in layer.parameters()]
        assert points and all(parameter.grad is not None for parameter in points)
        optimizer.step()
        losses.append(loss.item())
    return losses[-1] < 0.95 * losses[0]


# --- segmentation_models_pytorch ---


@pytest.mark.parametrize('decoder, kwargs', [
    ('Unet', dict(encoder_depth=4, decoder_channels=(32, 24, 16, 8))), ('FPN', dict(encoder_depth=4, upsampling=2)),
], ids=lambda value: value if isinstance(value, str) else '')
def test_segmentation(decoder, kwargs):
    torch.manual_seed(0)
    model = getattr(segmentation_models_pytorch, decoder)('tu-smpconv_nano', encoder_weights=None, **kwargs)
    assert model.encoder.out_channels == [3, 24, 48, 72, 96]
    mask = torch.zeros(2, 1, 64, 64)
    mask[:, :, 16:48, 32:] = 1
    images = mask + torch.randn(2, 3, 64, 64)
    assert model(images).shape == mask.shape
    assert learns(model, lambda: nn.functional.binary_cross_entropy_with_logits(model(images), mask))


def test_segmentation_counts_four_levels_from_a_stride_of_four_as_five():
    model = segmentation_models_pytorch.Unet('tu-smpconv_mobile31', encoder_weights=None).eval()
    assert model.encoder.out_channels == [3, 0, 64, 128, 256, 320]
    with torch.inference_mode():
        features = model.encoder(torch.randn(1, 3, 64, 64))
        assert [len(features[0][0]), *(64 // len(level[0, 0]) for level in features[2:])] == [3, 4, 8, 16, 32]
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1, 64, 64)


def test_segmentation_with_a_stride():
    """DeepLab needs an output stride, which only timm models with dilation support."""
    model = segmentation_models_pytorch.DeepLabV3Plus(
        'tu-smpconv_mobile31', encoder_weights=None, encoder_output_stride=16)
    assert model.encoder.model.feature_info.reduction() == [4, 8, 16, 16]


# --- transformers ---


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Folder of hub.convert for a checkpoint with seven classes and one input channel."""
    path = tmp_path_factory.mktemp('folder')
    model = nano(num_classes=7, in_chans=1)
    torch.save({
        'arch': 'smpconv_nano', 'state_dict': model.state_dict(), 'classes': list('abcdefg'),
        'model_kwargs': {'num_classes': 7, 'in_chans': 1}}, path / 'file.pth')
    return hub.convert(path / 'file.pth', path / 'model').folder


GRAY = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_transformers_classifier(folder):
    model = transformers.AutoModelForImageClassification.from_pretrained(folder)
    assert isinstance(model, transformers.TimmWrapperForImageClassification)
    torch.testing.assert_close(model.eval()(GRAY).logits, hub.load(folder).eval()(GRAY))
    assert model.config.id2label[6] == 'g'
    transform = transformers.AutoImageProcessor.from_pretrained(folder).data_config
    assert tuple(transform['input_size']) == (1, 32, 32) and len(transform['mean']) == 1


def test_transformers_classifier_trains(folder):
    model = transformers.TimmWrapperForImageClassification.from_pretrained(
        folder, num_labels=3, ignore_mismatched_sizes=True)
    loss = model(GRAY, labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert model.timm_model.head.fc.out_features == 3
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_transformers_features(folder):
    expected = hub.load(folder).eval()
    output = transformers.TimmWrapperModel.from_pretrained(folder).eval()(GRAY, output_hidden_states=True)
    last, hidden = expected.forward_intermediates(GRAY)
    torch.testing.assert_close(output.last_hidden_state, last)
    torch.testing.assert_close(output.pooler_output, last.mean((2, 3)))
    torch.testing.assert_close(list(output.hidden_states), hidden)


@torch.no_grad()
def test_what_transformers_saves_is_read_here(folder, tmp_path):
    """The weights differ from those of the folder whose configuration is copied."""
    model = transformers.TimmWrapperForImageClassification.from_pretrained(folder).eval()
    model.timm_model.head.fc.bias += 1
    model.save_pretrained(tmp_path / 'saved')
    loaded = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True).eval()
    torch.testing.assert_close(loaded(GRAY), model(GRAY).logits)


@torch.no_grad()
def test_transformers_backbone():
    config = transformers.TimmBackboneConfig(backbone='smpconv_nano', out_indices=(1, 3), freeze_batch_norm_2d=True)
    backbone = transformers.TimmBackbone(config).eval()
    assert list(backbone.channels) == [48, 96]
    images = torch.randn(1, 3, 64, 64)
    expected = timm.create_model('smpconv_nano', features_only=True, out_indices=(1, 3)).eval()
    expected.load_state_dict(backbone._backbone.state_dict(), strict=False)  # frozen norms count no batches
    for got, features in zip(backbone(images).feature_maps, expected(images)):
        torch.testing.assert_close(got, features)


# --- torchvision ---


@pytest.mark.parametrize('feature_cls', ['list', 'dict'])
def test_torchvision_fpn(feature_cls):
    """IntermediateLayerGetter visits the children of timm's wrapper by the names in return_layers."""
    body = timm.create_model('smpconv_nano', features_only=True, out_indices=(1, 2, 3), feature_cls=feature_cls)
    backbone = BackboneWithFPN(body, dict(body.return_layers), body.feature_info.channels(), out_channels=16)
    images = torch.randn(2, 3, 64, 64)
    maps = backbone(images)
    assert {name: tuple(level.shape) for name, level in maps.items()} == {
        '1': (2, 16, 16, 16), '2': (2, 16, 8, 8), '3': (2, 16, 4, 4), 'pool': (2, 16, 2, 2)}
    expected = body.eval()(images)
    got = backbone.eval().body(images)
    for features, level in zip(expected.values() if feature_cls == 'dict' else expected, got.values()):
        torch.testing.assert_close(level, features)


# --- effdet ---


def efficientdet_config(**kwargs):
    config = effdet.get_efficientdet_config('efficientdet_d0')
    config.update(
        dict(backbone_name='smpconv_nano', backbone_args={'stem_stride': 4}, image_size=(128, 128), num_classes=3,
             fpn_channels=16, fpn_cell_repeats=1, box_class_repeats=1, **kwargs))
    return config


def test_effdet_trains():
    torch.manual_seed(0)
    config = efficientdet_config(backbone_indices=(1, 2, 3))
    model = effdet.DetBenchTrain(effdet.EfficientDet(config, pretrained_backbone=False), config)
    assert model.model.backbone.feature_info.reduction() == [8, 16, 32]
    target = {'bbox': torch.tensor([[[10., 10, 50, 60]], [[20., 20, 90, 90]]]), 'cls': torch.tensor([[1.], [2.]])}
    images = torch.randn(2, 3, 128, 128)
    assert learns(model, lambda: model(images, target)['loss'], steps=10)    # the loss rises at first


def test_effdets_own_indices_are_beyond_our_stages():
    with pytest.raises(ValueError, match=r'out_indices must lie in \[-4, 3\], got \(2, 3, 4\)'):
        effdet.EfficientDet(efficientdet_config(), pretrained_backbone=False)


# --- norm layers that others make ---


def build_norm_layer(kind, channels, **kwargs):
    """Build a norm like mmcv: return the name and layer of a configuration."""
    layer = {'GN': lambda: nn.GroupNorm(num_channels=channels, **kwargs), 'SyncBN': lambda: nn.SyncBatchNorm(channels)}
    return kind.lower(), layer[kind]()


@pytest.mark.parametrize('norm_layer, kind', [
    (functools.partial(nn.GroupNorm, 4), nn.GroupNorm),
    (lambda channels: build_norm_layer('GN', channels, num_groups=4)[1], nn.GroupNorm),
    (lambda channels: build_norm_layer('SyncBN', channels)[1], nn.SyncBatchNorm),
], ids=['partial', 'mmcv-GN', 'mmcv-SyncBN'])
def test_norm_layers_by_callables(norm_layer, kind):
    model = timm.create_model('smpconv_nano', features_only=True, norm_layer=norm_layer).eval()
    norms = [module for name, module in model.named_modules() if name.endswith('norm')]
    assert norms and all(type(module) is kind for module in norms)
    images = torch.randn(2, 3, 32, 32)
    features = model(images)
    for got, expected in zip(timm.utils.reparameterize_model(model)(images), features):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


# --- Lightning ---


def test_lightning():
    lightning = pytest.importorskip('lightning')    # imports for 5 s

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = timm.create_model('smpconv_nano', num_classes=2)

        def training_step(self, batch, index):
            images, classes = batch
            return nn.functional.cross_entropy(self.model(images), classes)

        def on_train_batch_end(self, *args):
            smpconv_models.clip_radius_(self.model)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e3)  # throws the radii out of their range

    torch.manual_seed(0)
    module = Classifier()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    data = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 2)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # its advice on workers and logging
        trainer = lightning.Trainer(
            fast_dev_run=2, accelerator='cpu', enable_progress_bar=False, enable_model_summary=False)
        trainer.fit(module, DataLoader(data, 4))
    assert all(not torch.equal(old, new) for old, new in zip(before, module.parameters()))
    radii = torch.cat([layer.radius.detach() for layer in smp_layers(module).values()])
    assert radii.min() >= 0.001 and radii.max() <= 1
