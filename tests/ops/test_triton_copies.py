"""Copies that the Triton backend makes of tensors: recorded launches, and PyTorch's operators seen by its profiler."""
from collections import Counter

import pytest
import torch

pytest.importorskip('triton', reason='PyTorch brings Triton on Linux only')
import ahead_of_time
from grid import Shape, make

from smpconv_models.ops import _triton, depthwise_conv2d

SHAPE = Shape(2, 6, 28, 28, 9, 9)


def copies(monkeypatch, function):
    """Return the copies that a function makes: tiled transposes of ours, and PyTorch's."""
    with torch.profiler.profile() as profile:
        launched = ahead_of_time.launches(monkeypatch, function)
    transposed = sum(launch.kernel.fn.__name__ == 'transpose_maps' for launch in launched)
    names = Counter(event.name for event in profile.events())
    assert launched
    return transposed, sum(names[f'aten::{name}'] for name in ('copy_', 'flip', 'cat'))


@pytest.fixture
def tensors(monkeypatch, request):
    """Input, weight, bias and output gradient, for a backend that takes them although there is no GPU."""
    monkeypatch.setattr(_triton, 'unsupported_reason', lambda device, dtype=None: None)
    x, weight, bias, grad = make(SHAPE, torch.float32, 'slice' if request.param == 'slice' else 'nchw')
    if request.param == 'channels_last':
        x, grad = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, grad))
    if request.param == 'images and channels':
        x, grad = (torch.cat([tensor, tensor], 1)[:, :SHAPE.c] for tensor in (x, grad))
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), grad


@pytest.mark.parametrize(('tensors', 'forward', 'backward'), [
    ('nchw', (0, 0), (0, 0)),
    ('images and channels', (0, 0), (0, 0)),
    ('channels_last', (2, 0), (3, 0)),      # x and y; dy, dx and x
    ('slice', (0, 1), (0, 2)),              # x; dy and x
], indirect=['tensors'])
def test_each_tensor_is_copied_at_most_once_a_step(monkeypatch, tensors, forward, backward):
    *inputs, grad = tensors
    results = []
    assert copies(monkeypatch, lambda: results.append(depthwise_conv2d(*inputs, backend='triton'))) == forward
    y, = results
    assert copies(monkeypatch, lambda: torch.autograd.grad(y, inputs, grad)) == backward


@pytest.mark.parametrize('tensors', ['channels_last'], indirect=True)
@pytest.mark.parametrize(('wanted', 'expected'), [(0, (2, 0)), (1, (2, 0))])   # dy and dx; dy and x
def test_only_what_a_gradient_needs_is_copied(monkeypatch, tensors, wanted, expected):
    *inputs, grad = (tensor.detach() for tensor in tensors)
    inputs[wanted].requires_grad_()
    results = []
    copies(monkeypatch, lambda: results.append(depthwise_conv2d(*inputs, backend='triton')))
    y, = results
    assert copies(monkeypatch, lambda: torch.autograd.grad(y, inputs[wanted], grad)) == expected
