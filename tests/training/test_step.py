"""Single optimizer steps: accumulation, order, and what isn't finite."""
import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from smpconv_models import SMPConvNet
from smpconv_models.training import DeviceOptions, param_groups
from smpconv_models.training.distributed import DistributedContext
from smpconv_models.training.train_step import TrainStep

CPU = torch.device('cpu')
FLOAT32 = DeviceOptions()


class ConstantSchedule:
    """Scheduler that keeps the learning rates and records its updates."""

    def __init__(self):
        self.updates = []

    def step_update(self, number):
        self.updates.append(number)


def make_stepper(seed=0, scaler=False, norm_layer=None, ema=0.5, device_options=FLOAT32, **changes):
    torch.manual_seed(seed)
    model = SMPConvNet(
        in_chans=1, num_classes=4, depths=(1,), dims=(4,), kernel_sizes=(5,), small_kernel_size=3,
        **({} if norm_layer is None else {'norm_layer': norm_layer}))
    optimizer = torch.optim.SGD(param_groups(model, 0.05), lr=0.1)
    return TrainStep(
        model, model, ModelEmaV3(model, decay=ema), optimizer, ConstantSchedule(),
        torch.amp.GradScaler('cpu', enabled=scaler), nn.CrossEntropyLoss(), None, CPU, DistributedContext(),
        device_options, seed=1, **changes), model


def group_norm(channels):
    return nn.GroupNorm(1, channels)


def batches(count, size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randn(size, 1, 16, 16, generator=generator), torch.randint(0, 4, (size,), generator=generator)


def state(stepper):
    """Everything that a step may change."""
    return [value.clone() for value in (
        *stepper.model.state_dict().values(), *stepper.ema.module.state_dict().values())]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second))


def test_a_step_lowers_the_loss_and_tells_of_it():
    stepper, _ = make_stepper()
    (batch,) = batches(1)
    losses = [stepper.step(iter([batch]), number, False) for number in range(8)]
    assert all(outcome.applied and not outcome.stop_requested and outcome.lr == 0.1 for outcome in losses)
    assert losses[-1].loss < losses[0].loss
    assert stepper.scheduler.updates == list(range(1, 9))


def test_accumulated_batches_make_the_step_of_their_union():
    """But for batch norms, which see one batch at a time; so without them."""
    parts = list(batches(3))
    whole = tuple(torch.cat(tensors) for tensors in zip(*parts))
    one, model = make_stepper(norm_layer=group_norm)
    three, other = make_stepper(norm_layer=group_norm, grad_accum_steps=3)
    first, second = one.step(iter([whole]), 0, False), three.step(iter(parts), 0, False)
    assert second.loss == pytest.approx(first.loss, rel=1e-5)
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_recomputing_leaves_the_running_statistics_alone():
    plain, model = make_stepper(grad_accum_steps=2)
    recomputing, other = make_stepper(grad_accum_steps=2, recomputes=True)
    other.set_grad_checkpointing(True)
    for stepper in (plain, recomputing):
        stepper.step(batches(2), 0, False)
    torch.testing.assert_close(dict(other.named_buffers()), dict(model.named_buffers()))
    assert any(value.ndim and value.any() for value in model.buffers())


def test_the_loss_is_not_in_half_precision():
    stepper, _ = make_stepper(device_options=DeviceOptions(amp=True, amp_dtype='bfloat16'))
    seen, loss_fn = [], stepper.loss_fn
    stepper.loss_fn = lambda logits, target: seen.append(logits.dtype) or loss_fn(logits, target)
    stepper.step(batches(1), 0, False)
    assert seen == [torch.float32]


def test_the_average_reads_clipped_radii():
    stepper, model = make_stepper(ema=0.)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith('radius'):
                parameter.fill_(5.)
    stepper.step(batches(1), 0, False)
    radii = [value for name, value in stepper.ema.module.named_parameters() if name.endswith('radius')]
    assert radii and all(radius.max() <= 1 for radius in radii)


def test_the_gradient_is_clipped():
    free, model = make_stepper()
    clipped, other = make_stepper(clip_grad=1e-3)
    before = [parameter.clone() for parameter in model.parameters() if parameter.ndim == 1]
    for stepper in (free, clipped):
        stepper.step(batches(1), 0, False)

    def moved(network):
        after = [parameter for parameter in network.parameters() if parameter.ndim == 1]
        return sum((a - b).square().sum() for a, b in zip(after, before)).sqrt().item()

    assert moved(other) <= 1e-3 * 0.1 * 1.01 < moved(model)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(value):
    stepper, _ = make_stepper()
    good, bad = batches(2)
    stepper.step(iter([good]), 0, False)
    before = state(stepper)
    images = bad[0].clone()
    images[2, 0, 3, 3] = value
    outcome = stepper.step(iter([(images, bad[1])]), 1, False)
    assert not outcome.applied and outcome.report_here and not outcome.scale_overflow
    assert not torch.isfinite(torch.tensor(outcome.loss))
    assert same(state(stepper), before)  # the running statistics of the batch norms too
    assert stepper.step(iter([good]), 2, False).applied and not same(state(stepper), before)


def test_a_gradient_that_is_not_finite_is_not_applied():
    """Though the loss is: a square root at 0."""
    stepper, _ = make_stepper()
    stepper.loss_fn = lambda logits, target: (logits.sum() * 0).sqrt()
    before = state(stepper)
    outcome = stepper.step(batches(1), 0, False)
    assert outcome.loss == 0 and not outcome.applied and outcome.report_here
    assert same(state(stepper), before)


@pytest.mark.parametrize('scaler', [False, True])
def test_statistics_that_overflow_are_not_applied(scaler):
    """Loss and gradient are finite, as batch norms divide by what has overflowed; the loss scale does not matter."""
    stepper, _ = make_stepper(scaler=scaler)
    if scaler:
        stepper.scaler = torch.amp.GradScaler('cpu', init_scale=4.)
    before = state(stepper)
    images, target = next(batches(1))
    outcome = stepper.step(iter([(images * 1e25, target)]), 0, False)
    assert torch.isfinite(torch.tensor(outcome.loss)) and not outcome.applied and not outcome.scale_overflow
    assert outcome.report_here and outcome.problem == 'running statistics of the batch norms are not finite'
    assert same(state(stepper), before)
    assert stepper.step(batches(1), 1, False).applied


def test_unusual_values_refuse_no_step():
    """Masks that are infinite from the start, finite values with an infinite norm, and tensors without values."""
    stepper, model = make_stepper()
    for name, values in ('mask', [0., float('-inf')]), ('large', [3e38, 3e38]), ('empty', []):
        model.register_buffer(name, torch.tensor(values), persistent=False)
    stepper.optimizer.add_param_group({'params': [nn.Parameter(torch.tensor([3e38])), nn.Parameter(torch.empty(0))]})
    stepper.__post_init__()
    assert stepper.step(batches(1), 0, False).applied


def test_a_weight_that_is_not_finite_ends_the_run_at_the_next_step():
    stepper, model = make_stepper()
    assert stepper.last_applied is None
    stepper.step(batches(1), 7, False)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = float('inf')
    stepper.optimizer.param_groups[0]['lr'] = 0.2
    with pytest.raises(FloatingPointError, match='a weight is not finite'):
        stepper.step(batches(1), 8, False)
    assert stepper.last_applied == (7, 0.1)


def test_a_loss_scale_that_is_too_large_is_lowered_not_counted():
    stepper, _ = make_stepper(scaler=True, device_options=DeviceOptions(amp=True))
    stepper.scaler = torch.amp.GradScaler('cpu', init_scale=2. ** 40)
    before, outcomes = state(stepper), []
    while not outcomes or not outcomes[-1].applied:
        assert same(state(stepper), before)
        outcomes.append(stepper.step(batches(1), len(outcomes), False))
        assert len(outcomes) < 45
    assert len(outcomes) > 5 and all(outcome.scale_overflow for outcome in outcomes[:-1])
    assert not same(state(stepper), before)


def test_draws_depend_on_the_step_alone():
    """Of dropout, here: not on what was drawn before."""
    def loss(number, noise):
        stepper, model = make_stepper()
        model.head.drop = nn.Dropout(0.5)
        torch.manual_seed(noise)
        return stepper.step(batches(1), number, False).loss

    assert loss(3, noise=0) == loss(3, noise=1) != loss(4, noise=0)
