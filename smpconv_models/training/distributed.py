"""The processes of a run: which of them this is, what they sum up, and who is missing."""
import os
import time
from datetime import timedelta
from typing import Any, Callable, List, Optional, Sequence, Tuple, TypeVar

import torch
from timm.utils import world_info_from_env
from torch import Tensor
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.utils.data import DataLoader

from .bounded import BoundedLoader
from .signals import WorkerSignalGuard

# Seconds in which the processes that wait in vain find out one after another.
_ROLL_CALL = 5.

Result = TypeVar('Result')


class DistributedContext:
    """Processes of a run, of which this is one.

    Args:
        local_rank: Rank of this process on its machine.
        rank: Rank of this process.
        size: World size.

    Attributes:
        shield: Signal handling of this process's DataLoader workers.
    """

    def __init__(self, local_rank: int = 0, rank: int = 0, size: int = 1) -> None:
        self.local_rank, self.rank, self.size = local_rank, rank, size
        self.worker_init_fn = WorkerSignalGuard()
        self._loaders: List[BoundedLoader] = []
        self._store: Any = None

    @classmethod
    def from_environment(cls) -> 'DistributedContext':
        """Return the world that torchrun or Slurm has started; one process without them.

        Raises:
            ValueError: If a variable is not a whole number, or the numbers do not go together.
        """
        return cls(*_from_environment())

    @property
    def is_primary(self) -> bool:
        """Whether this process writes the files and tells of the run."""
        return self.rank == 0

    def init(self, device: torch.device, timeout: float) -> None:
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
                f'{os.environ.get("MASTER_ADDR")}:{os.environ.get("MASTER_PORT")}: {error}{_restart_hint()}') from error

    def bounded_loader(self, loader: DataLoader, seconds: float) -> BoundedLoader:
        """Bound each wait for a loader's workers, which end with :meth:`close_loaders`."""
        self._loaders.append(BoundedLoader(loader, seconds))
        return self._loaders[-1]

    def close_loaders(self) -> None:
        """End the DataLoader workers of this process."""
        self.worker_init_fn.release()
        while self._loaders:
            self._loaders.pop().close()

    @staticmethod
    def is_initialized() -> bool:
        """Return whether this process is in a process group."""
        return dist.is_available() and dist.is_initialized()

    def destroy(self) -> None:
        """Leaves the others, who must be leaving too."""
        if self.is_initialized():
            dist.destroy_process_group()

    def sum(self, *values: Tensor) -> List[float]:
        """The sum of each scalar over the processes, in float32."""
        tensor = torch.stack([value.detach().float() for value in values])
        return self.all_reduce_(tensor).tolist()

    def all_reduce_(self, values: Tensor) -> Tensor:
        """The sums of a tensor's values over the processes, in its own type; in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """The first process's value, which may be anything that pickles, in all of them."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def run_on_primary(self, work: Callable[[], Result]) -> Optional[Result]:
        """The first process does something; the others wait, lest their end be its end too, and fail if it does.

        Returns:
            What it came to in the first process; None in the others.
        """
        result, problem = None, None
        if self.is_primary:
            try:
                result = work()
            except (ArithmeticError, OSError, RuntimeError, ValueError) as error:
                problem = error
        problem = self.broadcast_object(problem)
        if problem is not None:
            raise problem
        return result

    def unresponsive_ranks(self) -> str:
        """Who of the others hasn't failed as this process has, in words: these are dead or hang."""
        try:
            self._store.set(f'failed/{self.rank}', '')
            time.sleep(_ROLL_CALL)
            gone = [rank for rank in range(self.size) if not self._store.check([f'failed/{rank}'])]
        except RuntimeError:  # it is kept by torchrun or by the first process
            return 'where they met, nobody answers'
        return f'no sign of {_named(gone)}' if gone else f'all {self.size} are there'


# Variables of torchrun, and what timm reads in their absence.
_VARIABLES = {
    'WORLD_SIZE': ('WORLD_SIZE', 'PMI_SIZE', 'SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE'),
    'RANK': ('RANK', 'PMI_RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'),
    'LOCAL_RANK': ('LOCAL_RANK', 'MPI_LOCALRANKID', 'SLURM_LOCALID', 'OMPI_COMM_WORLD_LOCAL_RANK'),
}


def _from_environment() -> Tuple[int, int, int]:
    """Local rank, rank and world size.

    Raises:
        ValueError: If a variable is not a whole number, or the numbers do not go together.
    """
    found = {kind: next((name for name in names if name in os.environ), '') for kind, names in _VARIABLES.items()}
    names = [name for name in found.values() if name]
    if found['WORLD_SIZE'] == 'WORLD_SIZE':
        names.append('MASTER_PORT')
    for name in names:
        text = os.environ.get(name, '0')
        if not text.strip().isdecimal():
            raise ValueError(f'the environment variable {name} must be a whole number, got {text!r}')
    local_rank, rank, size = world_info_from_env()
    if not rank < size:
        raise ValueError(
            f'the environment variable {found["RANK"] or "RANK"} must be below {found["WORLD_SIZE"] or "WORLD_SIZE"}, '
            f'got {rank} and {size}')
    return local_rank, rank, size


def _restart_hint() -> str:
    """With a store that torchrun shares they find the addresses from before (PyTorch 2.10 to 2.15)."""
    restarted = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0
    return '; restarts by torchrun need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment' if restarted else ''


def _named(ranks: Sequence[int]) -> str:
    return f'rank {ranks[0]}' if len(ranks) == 1 else f'ranks {", ".join(map(str, ranks))}'
