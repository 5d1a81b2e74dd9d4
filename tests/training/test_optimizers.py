"""Optimizers of timm: their state is saved, checked and loaded without a change of a bit."""
import pytest
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from smpconv_models import checkpoint
from smpconv_models.training import checkpointing

ELSEWHERE = ('bnb*', 'fused*', 'adahessian')  # for CUDA, or for second derivatives
SLOW = ('*kron*',)  # 10 s each: they compile


def make(name):
    """Return a model with sizes that Adafactor factors, and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 130), nn.Linear(130, 129))
    groups = [{'params': [parameter for parameter in model.parameters() if (parameter.ndim > 1) == is_decayed],
               'weight_decay': 0.05 * is_decayed} for is_decayed in (True, False)]
    return model, create_optimizer_v2(groups, opt=name, lr=1e-3, momentum=0.9)


def step(model, optimizer, number):
    torch.manual_seed(number)
    model(torch.randn(4, 3, 4, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize('name', [
    *list_optimizers(exclude_filters=[*ELSEWHERE, *SLOW]),
    *(pytest.param(name, marks=pytest.mark.slow) for name in list_optimizers(SLOW)),
])
def test_the_next_step_after_loading_has_the_same_bits(name, tmp_path):
    model, optimizer = make(name)
    for number in range(3):
        step(model, optimizer, number)
    torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict()}, tmp_path / 'saved')
    saved = checkpoint.load_file(tmp_path / 'saved')
    other, loaded = make(name)
    other.load_state_dict(saved['model'])
    checkpointing._check_optimizer(saved['optimizer'])
    checkpointing.load_optimizer(loaded, saved['optimizer'])
    for each in ((model, optimizer), (other, loaded)):
        step(*each, number=3)
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


@pytest.mark.parametrize(('name', 'change', 'told'), [
    ('adan', lambda state: state['param_groups'][0].update(step='x'), 'option step of the optimizer .* got \'x\''),
    ('lamb', lambda state: state['param_groups'][0].update(step=torch.ones(2)), 'option step .* got a Tensor'),
    ('adamw', lambda state: state['param_groups'][0].update(betas=0.9), 'option betas .* got 0.9'),
    ('novograd', lambda state: state['state'][0].update(exp_avg_sq=torch.ones(5)), r'exp_avg_sq .* got \(5,\)'),
    ('adamw', lambda state: state['state'][0].update(exp_avg=torch.ones(7)), 'exp_avg of parameter 0'),
    ('adamw', lambda state: state['state'][0].update(step='x'), 'step of parameter 0'),
    ('adamw', lambda state: state['state'][0].update(step=torch.tensor(-5.)), 'step of parameter 0'),
    ('adamw', lambda state: state['state'][0].update(step=torch.tensor(1j)), 'step of parameter 0'),
    ('adamw', lambda state: state['state'].update({10 ** 6: {}}), 'no parameter 1000000'),
    ('adamw', lambda state: state['param_groups'].pop(),
     r'groups of the optimizer must have \[3, 5\] parameters, got \[3\]'),
    ('adamw', lambda state: state['param_groups'][0].update(amsgrad='x'),
     "option amsgrad .* a value like False, got 'x'"),
])
def test_values_that_no_optimizer_has_are_refused(name, change, told):
    model, optimizer = make(name)
    step(model, optimizer, 0)
    state = optimizer.state_dict()
    change(state)
    with pytest.raises(ValueError, match=told):
        checkpointing.load_optimizer(make(name)[1], state)


@pytest.mark.parametrize('change', [
    lambda group: group.pop('maximize'),  # like checkpoints of a version of timm without this option
    lambda group: group.update(maximize=True, lr=7.),  # a checkpoint does not turn the direction of the steps
])
def test_flags_and_learning_rates_are_those_of_the_command(change):
    model, optimizer = make('adamw')
    step(model, optimizer, 0)
    state = optimizer.state_dict()
    change(state['param_groups'][0])
    loaded = make('adamw')[1]
    checkpointing.load_optimizer(loaded, state)
    assert loaded.param_groups[0]['maximize'] is False and loaded.param_groups[0]['lr'] == 1e-3
