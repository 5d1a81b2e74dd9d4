"""The processes of a run: which of them this is, what they sum up, and who is missing."""
import os
from datetime import timedelta
from typing import Any, List, Sequence

import torch
from timm.utils import world_info_from_env
from torch import Tensor
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous


class World:
    """This process among those that torchrun or Slurm has started; alone without them."""

    def __init__(self) -> None:
        self.local_rank, self.rank, self.size = world_info_from_env()
        self._store: Any = None

    @classmethod
    def alone(cls) -> 'World':
        """A world of one process, whatever has been started."""
        world = cls()
        world.local_rank, world.rank, world.size = 0, 0, 1
        return world

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and tells of the run."""
        return self.rank == 0

    def connect(self, device: torch.device, timeout: float) -> None:
        """Meets the other processes.

        Args:
            device: Where the collectives' tensors are.
            timeout: Seconds after which a process that waits for another one gives up.

        Raises:
            ValueError: The environment doesn't say where to meet, or nobody came.
        """
        if self.size == 1:
            return
        limit = timedelta(seconds=timeout)
        if device.type == 'cuda':
            torch.cuda.set_device(device)
        try:
            self._store, _, _ = next(rendezvous(f'env://?rank={self.rank}&world_size={self.size}', timeout=limit))
            dist.init_process_group(
                'nccl' if device.type == 'cuda' else 'gloo', store=self._store, rank=self.rank, world_size=self.size,
                timeout=limit)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f'process {self.rank} of {self.size} cannot meet the others at '
                f'{os.environ.get("MASTER_ADDR")}:{os.environ.get("MASTER_PORT")}: {error}') from error
        self.arrive(0)

    def disconnect(self) -> None:
        """Leaves the others, who must be leaving too."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

    def total(self, *values: Tensor) -> List[float]:
        """The sum of each scalar over the processes, in float32."""
        tensor = torch.stack([value.detach().float() for value in values])
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor.tolist()

    def total_exact(self, values: Tensor) -> Tensor:
        """The sums of a tensor of float64 or int64 over the processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def share(self, value: Any) -> Any:
        """The first process's value, which may be anything that pickles, in all of them."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def arrive(self, step: int) -> None:
        """Says that this process is about to wait for the others in this step."""
        if self._store is not None:
            self._store.set(f'step/{self.rank}', str(step))

    def missing(self) -> str:
        """Who has kept the others waiting, in words."""
        steps = [self._step_of(rank) for rank in range(self.size)]
        if max(steps) < 0:
            return 'the one that they all met at is gone'
        late = [rank for rank, step in enumerate(steps) if step < max(steps)]
        if not late:
            return f'all {self.size} processes were in step {max(steps)}'
        return f'no sign of {_named(late)} after step {min(steps)}; the others were in step {max(steps)}'

    def _step_of(self, rank: int) -> int:
        name = f'step/{rank}'
        try:
            return int(self._store.get(name)) if self._store.check([name]) else -1
        except (RuntimeError, ValueError):  # the process that keeps the store is the one that is gone
            return -1


def _named(ranks: Sequence[int]) -> str:
    return f'rank {ranks[0]}' if len(ranks) == 1 else f'ranks {", ".join(map(str, ranks))}'
