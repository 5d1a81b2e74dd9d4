"""timm's feature wrappers: all return the stages' outputs."""
import re

import pytest
import torch
from nets import network, tiny

CLASSES = ['list', 'dict', 'hook', 'fx', 'getter']
INDICES = [(None, 32), (2, 32), ((1,), 32), ((0, 2), 32), ((1, 2, 3), 32), ((-4, -1), 32), ((1, 3), 8)]


def features(x, feature_cls, out_indices, **kwargs):
    """A wrapper with the weights of ``network``, and its outputs as a list."""
    extra = {} if out_indices is None else dict(out_indices=out_indices)
    model = tiny(features_only=True, feature_cls=feature_cls, **extra, **kwargs).eval()
    source = network(**kwargs).state_dict()
    # two keep the network as an attribute, the others write stages.0 as stages_0
    model.load_state_dict({
        key: source[re.sub(r'^(stem|stages)_', r'\1.', re.sub(r'^(graph_module|model)\.', '', key))]
        for key in model.state_dict()
    })
    outputs = model(x)
    return model, list(outputs.values()) if isinstance(outputs, dict) else list(outputs)


FX_WARNING = pytest.mark.filterwarnings('ignore:NOTE. The nodes obtained by tracing')  # of torchvision, always


@FX_WARNING
@pytest.mark.parametrize(('out_indices', 'output_stride'), INDICES, ids=str)
@pytest.mark.parametrize('feature_cls', CLASSES)
def test_features_are_the_stages_outputs(feature_cls, out_indices, output_stride):
    x = torch.randn(2, 3, 64, 96)
    model, got = features(x, feature_cls, out_indices, output_stride=output_stride)
    every = network(output_stride=output_stride).forward_intermediates(x, intermediates_only=True)
    expected = every[-out_indices:] if isinstance(out_indices, int) else [every[i] for i in out_indices or range(4)]
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert torch.equal(a, b)
    assert model.feature_info.channels() == [b.shape[1] for b in expected]
    assert model.feature_info.reduction() == [64 // b.shape[2] for b in expected]


@FX_WARNING
@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'fx'])
def test_features_train(feature_cls):
    model = tiny(features_only=True, feature_cls=feature_cls, out_indices=(1, 3))
    outputs = model(torch.randn(2, 3, 64, 64))
    sum(out.sum() for out in (outputs.values() if isinstance(outputs, dict) else outputs)).backward()
    points = [parameter for name, parameter in model.named_parameters() if name.endswith(('coords', 'radius'))]
    assert len(points) == 10
    assert all(parameter.grad.abs().max() > 0 for parameter in points)


def test_unneeded_stages_are_dropped():
    model = tiny(features_only=True, out_indices=(0, 1))
    assert not any(name.startswith(('stages_2', 'stages_3', 'norm', 'head')) for name, _ in model.named_parameters())


def test_scripted_features():
    x = torch.randn(1, 3, 64, 64)
    model, expected = features(x, 'list', (0, 3))
    for a, b in zip(torch.jit.script(model)(x), expected):
        torch.testing.assert_close(a, b)
