"""Parameter groups: what decays, and at which rate."""
import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

from smpconv_models import SMPConvNet
from smpconv_models.training import param_groups


@pytest.fixture
def model():
    return SMPConvNet(depths=(1, 1), dims=(4, 8), kernel_sizes=(7, 5), num_classes=3)


def options_of(model, groups):
    """Name -> (weight_decay, lr_scale), each parameter once."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    options = {}
    for group in groups:
        for parameter in group['params']:
            name = names[id(parameter)]
            assert name not in options
            options[name] = group['weight_decay'], group['lr_scale']
    return options


def test_decay_and_learning_rate_of_each_kind(model):
    options = options_of(model, param_groups(model, 0.05))
    assert options.keys() == dict(model.named_parameters()).keys()
    for name, (weight_decay, lr_scale) in options.items():
        parameter = model.get_parameter(name)
        free = parameter.ndim <= 1 or name.endswith(('.bias', '.coords', '.radius'))
        assert weight_decay == (0. if free else 0.05), name
        assert lr_scale == pytest.approx(0.1 if name.endswith('.radius') else 1.), name


def test_radii_keep_their_tenth_under_layer_decay(model):
    options = options_of(model, param_groups(model, 0.05, layer_decay=0.5))
    radii = [name for name in options if name.endswith('.radius')]
    assert len(radii) == 2
    for name in radii:
        assert options[name][1] == pytest.approx(0.1 * options[name.replace('.radius', '.coords')][1])
    assert len({scale for _, scale in options.values()}) > 3  # the layers differ


def test_a_wrapper_does_not_lose_the_points():
    backbone = timm.create_model('smpconv_nano', features_only=True)
    options = options_of(backbone, param_groups(backbone, 0.05))
    assert {options[name] for name in options if name.endswith('.coords')} == {(0., 1.)}
    assert {options[name] for name in options if name.endswith('.radius')} == {(0., 0.1)}


def test_scheduler_applies_the_scale(model):
    optimizer = create_optimizer_v2(param_groups(model, 0.05), opt='adamw', lr=1e-2)
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=4, updates_per_epoch=5, step_on_epochs=False)
    scheduler.step_update(7)
    rates = {group['lr_scale']: group['lr'] for group in optimizer.param_groups}
    assert rates[0.1] == pytest.approx(0.1 * rates[1.])


def test_a_model_without_points_gets_timms_groups():
    groups = param_groups(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3)), 0.1)
    assert sorted((group['weight_decay'], group['lr_scale']) for group in groups) == [(0., 1.), (0.1, 1.)]
