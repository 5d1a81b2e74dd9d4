"""Helpers of several test folders."""
import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from smpconv_models import checkpoint

# Largest resident set in KiB of the process that evaluates it; getrusage counts the process that started it, too.
PEAK_KIB = 'int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])'
IS_OLD_TIMM = tuple(map(int, timm.__version__.split('.')[:3])) < (1, 0, 31)


def randomize_(module, seed=0):
    """Parameters and batch-norm statistics that are not trivial, and positive where they must be. In place."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor, low, high):
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for submodule in module.modules():
            for name, parameter in submodule.named_parameters(recurse=False):
                if name == 'radius':
                    uniform(parameter, 0.1, 0.9)
                elif name == 'coords':
                    uniform(parameter, -1, 1)
                elif name == 'bias':
                    uniform(parameter, -0.5, 0.5)
                elif parameter.ndim == 1:
                    uniform(parameter, 0.5, 1.5)
                else:
                    fan_in = parameter[0].numel()
                    uniform(parameter, -(3 / fan_in) ** 0.5, (3 / fan_in) ** 0.5)
            if getattr(submodule, 'running_mean', None) is not None:
                uniform(submodule.running_mean, -0.5, 0.5)
                uniform(submodule.running_var, 0.5, 2.)
    return module


def relative_error(got, expected):
    """Largest difference over the largest value, in float64."""
    got, expected = got.double(), expected.double()
    return ((got - expected).abs().max() / expected.abs().max()).item()


def has_batch_norm(module):
    return any(isinstance(submodule, nn.modules.batchnorm._BatchNorm) for submodule in module.modules())


def assert_frozen(name, model):
    """Names, shapes and order of a model's state dict are those of tests/golden."""
    path = Path(__file__).parent / 'golden' / f'{name}_state_dict.json'
    frozen = {key: tuple(shape) for key, shape in json.loads(path.read_text()).items()}
    state_dict = model.state_dict()
    assert {key: tuple(value.shape) for key, value in state_dict.items()} == frozen
    assert list(state_dict) == list(frozen)


def released(data):
    """Return the state dict, in the release's names, of an output of the release's code."""
    return {key.removeprefix('state_dict.'): value for key, value in data.items() if key.startswith('state_dict.')}


def assert_other_shape_is_one_line(model, state_dict, key, change):
    """Check that a state dict with one tensor changed or added is rejected in one line."""
    state_dict[key] = change(state_dict.get(key))
    with pytest.raises(ValueError, match=r'^the checkpoint does not fit the model: [^\n]*$'):
        load_into(model, state_dict)


def load_into(model, loaded, use_ema=None):
    """Load a checkpoint's weights into a model that must fit them exactly; return their key."""
    state_dict, key = checkpoint.select_state_dict(loaded, use_ema)
    model.load_state_dict(checkpoint.convert_and_check(state_dict, model))
    return key


class Call:
    """Calls a function when it is unpickled by a loader that permits it."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def one_line_error(call, *args, kind=ValueError, **kwargs):
    """Return the message of the ValueError that a call raises, which is one line."""
    with pytest.raises(ValueError) as error:
        call(*args, **kwargs)
    message = str(error.value)
    assert type(error.value) is kind and message and len(message.splitlines()) == 1
    return message


def only_warning(caplog):
    """Return the one line that the package logged, a warning."""
    record, = [record for record in caplog.records if record.name.startswith('smpconv_models')]
    assert record.levelname == 'WARNING' and len(record.getMessage().splitlines()) == 1
    return record.getMessage()
