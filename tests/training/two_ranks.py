"""Run by each of two processes: steps together, one of which has a NaN in one process's images."""
import io
import sys

import torch
from test_step import batches, make_stepper, same, state
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from smpconv_models.training.world import World


def everywhere_the_same(stepper):
    """Whether both processes have the same weights."""
    file = io.BytesIO()
    torch.save([parameter.detach() for parameter in stepper.model.parameters()], file)
    contents = [None, None]
    dist.all_gather_object(contents, file.getvalue())
    return contents[0] == contents[1]


def main():
    world = World()
    world.connect(torch.device('cpu'), timeout=60)
    stepper, model = make_stepper(seed=world.rank, grad_accum_steps=2)
    stepper.world, stepper.wrapped = world, DistributedDataParallel(model)
    assert everywhere_the_same(stepper)

    outcome = stepper.step(batches(2, seed=world.rank), 0, False)
    assert outcome.applied and everywhere_the_same(stepper)
    assert world.share(outcome.loss) == outcome.loss  # the mean of both

    before = state(stepper)
    poisoned = list(batches(2, seed=world.rank))
    if world.rank == 1:
        poisoned[1][0][0, 0, 0, 0] = float('nan')
    outcome = stepper.step(iter(poisoned), 1, world.rank == 1)
    assert not outcome.applied and outcome.is_mine == (world.rank == 1) and outcome.stop
    assert same(state(stepper), before)

    outcome = stepper.step(batches(2, seed=world.rank), 2, False)
    assert outcome.applied and not outcome.stop and everywhere_the_same(stepper) and not same(state(stepper), before)
    world.disconnect()
    return 0


if __name__ == '__main__':
    sys.exit(main())
