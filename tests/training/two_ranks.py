"""Run by each of two processes: what they do together, held against one; a step with a NaN in one process's images."""
import io
import sys

import pytest
import torch
from test_step import batches, group_norm, make_stepper, same, state
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from smpconv_models.training.distributed import DistributedContext
from smpconv_models.training.validate import ClassificationMeter


def everywhere_the_same(stepper):
    """Whether both processes have the same weights."""
    file = io.BytesIO()
    torch.save([parameter.detach() for parameter in stepper.model.parameters()], file)
    contents = [None, None]
    dist.all_gather_object(contents, file.getvalue())
    return contents[0] == contents[1]


def check_a_step_is_that_of_one_process(world):
    """Without batch norms, and with an optimizer whose step grows with the gradient."""
    alone, expected = make_stepper(norm_layer=group_norm)
    together, model = make_stepper(norm_layer=group_norm)
    together.world, together.wrapped = world, DistributedDataParallel(model)
    parts = [next(batches(1, seed=rank)) for rank in range(world.size)]
    whole = tuple(torch.cat(tensors) for tensors in zip(*parts))
    first, second = alone.step(iter([whole]), 0, False), together.step(iter([parts[world.rank]]), 0, False)
    torch.testing.assert_close(second.loss, first.loss, rtol=1e-5, atol=0)
    for a, b in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def check_sums_are_those_of_one_process(world):
    images, target = next(batches(1, size=7))
    whole, part = ClassificationMeter(torch.device('cpu'), 4), ClassificationMeter(torch.device('cpu'), 4)
    logits = images.flatten(1)[:, :4]
    whole.add(logits, target)
    part.add(logits[world.rank::world.size], target[world.rank::world.size])
    expected, got = whole.result(DistributedContext()), part.result(world)
    assert torch.equal(got.pop('confusion'), expected.pop('confusion'))
    torch.testing.assert_close(got, expected)


def check_an_error_of_the_first_is_everybodys(world):
    for kind in (OSError, ValueError, FloatingPointError):
        def fail(kind=kind):
            raise kind('of the first')

        with pytest.raises(kind, match='of the first'):
            world.run_on_primary(fail)
    assert world.run_on_primary(lambda: world.rank) == (0 if world.is_primary else None)


def main():
    world = DistributedContext.from_environment()
    world.init(torch.device('cpu'), timeout=60)
    check_a_step_is_that_of_one_process(world)
    check_sums_are_those_of_one_process(world)
    check_an_error_of_the_first_is_everybodys(world)
    stepper, model = make_stepper(seed=world.rank, grad_accum_steps=2)
    stepper.world, stepper.wrapped = world, DistributedDataParallel(model)
    assert everywhere_the_same(stepper)

    outcome = stepper.step(batches(2, seed=world.rank), 0, False)
    assert outcome.applied and everywhere_the_same(stepper)

    before = state(stepper)
    poisoned = list(batches(2, seed=world.rank))
    if world.rank == 1:
        poisoned[1][0][0, 0, 0, 0] = float('nan')
    outcome = stepper.step(iter(poisoned), 1, world.rank == 1)
    assert not outcome.applied and outcome.stop_requested
    assert outcome.report_here == (world.rank == 1)
    assert same(state(stepper), before)

    outcome = stepper.step(batches(2, seed=world.rank), 2, False)
    assert outcome.applied and not outcome.stop_requested
    assert everywhere_the_same(stepper) and not same(state(stepper), before)
    world.destroy()
    return 0


if __name__ == '__main__':
    sys.exit(main())
