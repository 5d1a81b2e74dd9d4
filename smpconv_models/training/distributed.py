"""Ranks of a run: process group, collectives, signals that ask the run to stop, and waits for DataLoader workers."""
import multiprocessing
import os
import signal
import threading
import time
from contextlib import suppress
from datetime import timedelta
from types import FrameType
from typing import Any, Callable, Dict, Iterator, List, Optional, TypeVar

import torch
from timm.utils import world_info_from_env
from torch import Tensor
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.utils.data import DataLoader

# Seconds within which ranks that time out notice it, one after another.
_FAILURE_GRACE_S = 5.

# Variables of torchrun, and those that timm reads in their absence.
_VARIABLES = {
    'WORLD_SIZE': ('WORLD_SIZE', 'PMI_SIZE', 'SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE'),
    'RANK': ('RANK', 'PMI_RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'),
    'LOCAL_RANK': ('LOCAL_RANK', 'MPI_LOCALRANKID', 'SLURM_LOCALID', 'OMPI_COMM_WORLD_LOCAL_RANK'),
}

Result = TypeVar('Result')


class DistributedContext:
    """World of a run, of which this process is one rank. Without arguments: a single process.

    Args:
        local_rank: Rank of this process on its machine.
        rank: Rank of this process.
        size: World size.

    Attributes:
        worker_init_fn: ``worker_init_fn`` of this rank's DataLoaders.
    """

    def __init__(self, local_rank: int = 0, rank: int = 0, size: int = 1) -> None:
        self.local_rank, self.rank, self.size = local_rank, rank, size
        self.worker_init_fn = WorkerSignalGuard()
        self._loaders: List[BoundedLoader] = []
        self._store: Any = None

    @classmethod
    def from_environment(cls) -> 'DistributedContext':
        """Return the world that torchrun or Slurm has started; a single process without them.

        Raises:
            ValueError: If a variable is not a whole number, or the numbers contradict each other.
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
                f'the environment variable {found["RANK"] or "RANK"} must be below '
                f'{found["WORLD_SIZE"] or "WORLD_SIZE"}, got {rank} and {size}')
        return cls(local_rank, rank, size)

    @property
    def is_primary(self) -> bool:
        """Whether this rank writes the files and logs."""
        return self.rank == 0

    def init(self, device: torch.device, timeout: float) -> None:
        """Initialize the process group.

        Args:
            device: Device of the tensors in collectives.
            timeout: Seconds after which a rank stops waiting for another one.

        Raises:
            ValueError: If the environment has no address, or the connection times out.
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
            hint = ''
            if int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0:
                # a store that torchrun shares still has the addresses from before the restart (PyTorch 2.10 to 2.15)
                hint = '; restarts by torchrun need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment'
            raise ValueError(
                f'rank {self.rank} of {self.size} could not connect to the other ranks at '
                f'{os.environ.get("MASTER_ADDR")}:{os.environ.get("MASTER_PORT")}: {error}{hint}') from error

    @staticmethod
    def is_initialized() -> bool:
        """Return whether this process is in a process group."""
        return dist.is_available() and dist.is_initialized()

    def destroy(self) -> None:
        """Destroy the process group, together with the other ranks."""
        if self.is_initialized():
            dist.destroy_process_group()

    def bounded_loader(self, loader: DataLoader, seconds: float) -> 'BoundedLoader':
        """Bound each wait for a loader's workers, which end with :meth:`close_loaders`."""
        self._loaders.append(BoundedLoader(loader, seconds))
        return self._loaders[-1]

    def close_loaders(self) -> None:
        """End the DataLoader workers of this rank."""
        self.worker_init_fn.release()
        while self._loaders:
            self._loaders.pop().close()

    def sum(self, *values: Tensor) -> List[float]:
        """Return the sum of each scalar over the ranks, in float32."""
        return self.all_reduce_(torch.stack([value.detach().float() for value in values])).tolist()

    def all_reduce_(self, values: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in its own type and in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's value, which may be anything that can be pickled, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def run_on_primary(self, work: Callable[[], Result]) -> Optional[Result]:
        """Run ``work`` on rank 0 while the other ranks wait; an error is re-raised on every rank.

        Returns:
            The result on rank 0, None elsewhere.
        """
        result, problem = None, None
        if self.is_primary:
            try:
                result = work()
            except (ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
                problem = error
        problem = self.broadcast_object(problem)
        if problem is not None:
            raise problem
        return result

    def unresponsive_ranks(self) -> str:
        """Describe which ranks have not failed as this one has: these are dead or hang."""
        try:
            self._store.set(f'failed/{self.rank}', '')
            time.sleep(_FAILURE_GRACE_S)
            gone = [rank for rank in range(self.size) if not self._store.check([f'failed/{rank}'])]
        except RuntimeError:  # torchrun or rank 0 keeps the store
            return 'no response from the store of the process group'
        ranks = f'rank {gone[0]}' if len(gone) == 1 else f'ranks {", ".join(map(str, gone))}'
        return f'no response from {ranks}' if gone else f'all {self.size} ranks responded'


# --- signals ---

# SIGUSR1 is what Slurm sends ahead of the time limit if it is asked to (sbatch --signal=USR1@120); SIGHUP is sent when
# a terminal is closed.
_SIGNALS = tuple(
    getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGUSR1', 'SIGHUP', 'SIGQUIT') if hasattr(signal, name))


def _set_handlers(handler: Any) -> Dict[int, Any]:
    """Set the handler of all signals that are not ignored, as nohup ignores SIGHUP; return the previous handlers."""
    return {number: signal.signal(number, handler) for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN}


class TrainingInterrupted(Exception):
    """A run was asked to stop, and has saved a checkpoint.

    Args:
        number: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f'stopped by {signal.Signals(number).name}')
        self.exit_code = 128 + number


class GracefulStop:
    """Context manager that records a signal to stop. A second Ctrl-C stops without waiting for the end of a step."""

    def __init__(self) -> None:
        self.number: Optional[int] = None
        self._handlers: Dict[int, Any] = {}

    def __enter__(self) -> 'GracefulStop':
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            self._handlers = _set_handlers(self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Optional[FrameType]) -> None:
        if number == signal.SIGINT and self.number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number


class WorkerSignalGuard:
    """``worker_init_fn`` that keeps a signal to all processes of a job from ending workers before their parent."""

    def __init__(self) -> None:
        self._is_released = multiprocessing.RawValue('b', 0)  # shared with the workers

    def release(self) -> None:
        """Let signals end the workers from now on, as the parent is about to end."""
        self._is_released.value = 1

    def __call__(self, worker: int) -> None:
        """Set the handlers in a worker."""
        _set_handlers(self._end_if_released)

    def _end_if_released(self, number: int, frame: Optional[FrameType]) -> None:
        if self._is_released.value:
            os._exit(128 + number)


# --- DataLoaders ---


# Seconds for workers to end after the request to end, and for a killed worker to end.
_WORKER_GRACE_S = 3.


class BoundedLoader:
    """DataLoader that kills its workers if they do not respond within a number of seconds.

    The workers are persistent, or there are none. PyTorch's own timeout does not cover a worker that stops while it
    hands over a batch, while an epoch begins, or when the workers should end.
    """

    def __init__(self, loader: DataLoader, seconds: float) -> None:
        self.loader: Any = loader
        self.seconds = seconds

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def batch_size(self) -> Optional[int]:
        """Batch size of the loader; None if a sampler makes the batches."""
        return self.loader.batch_size

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches; raise TimeoutError if the workers gave no batch within the limit."""
        if self.loader.num_workers == 0:
            yield from self.loader
            return
        limit = _Limit(self.seconds, self._kill)
        try:
            with limit:
                batches = iter(self.loader)
            while True:
                with limit:
                    try:
                        batch = next(batches)
                    except StopIteration:
                        return
                yield batch
        except (EOFError, OSError, RuntimeError) as error:  # as PyTorch notices that a worker died
            if not limit.is_exceeded:
                if isinstance(error, (EOFError, ConnectionError)):  # while the worker handed over a batch
                    raise RuntimeError(f'DataLoader worker (pid unknown) exited unexpectedly: {error!r}') from error
                raise
            self._kill_and_join()
            self.close()  # the next iteration starts other workers
            raise TimeoutError(
                f'no batch came from the DataLoader workers in {self.seconds:g} s, so they were killed: they hang, or '
                f'shared memory (/dev/shm) is full; try fewer --workers than {self.loader.num_workers}, or a longer '
                '--dist-timeout') from None
        finally:
            limit.end()

    def close(self) -> None:
        """End the workers; those that have not ended after a few seconds are killed."""
        batches = self.loader._iterator
        if batches is None:
            return
        shutdown = threading.Thread(target=batches._shutdown_workers, daemon=True)  # it may wait without a limit
        shutdown.start()
        shutdown.join(_WORKER_GRACE_S)
        self._kill_and_join()
        self.loader._iterator = None

    def _workers(self) -> List[Any]:
        return list(getattr(self.loader._iterator, '_workers', ()))

    def _kill(self) -> None:
        """Kill the workers without a wait: PyTorch's handler of SIGCHLD must find them, to end its own wait."""
        for worker in self._workers():
            worker.kill()  # ends a stopped process too

    def _kill_and_join(self) -> None:
        """Kill the workers and wait for their end."""
        for act in (self._kill, self._join, self._join):
            with suppress(RuntimeError):  # PyTorch's handler of SIGCHLD raises it in the main thread, once
                act()

    def _join(self) -> None:
        for worker in self._workers():
            worker.join(_WORKER_GRACE_S)


class _Limit:
    """Context manager that calls `act` from another thread if a block takes longer than a limit, in seconds.

    The thread counts seconds in short waits, so that the time in which a process was stopped does not count.
    """

    def __init__(self, seconds: float, act: Callable[[], None]) -> None:
        self.seconds = seconds
        self.act = act
        self.is_exceeded = False
        self._block = 0
        self._is_inside = False
        self._has_ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> None:
        self._block += 1
        self._is_inside = True

    def __exit__(self, *error: Any) -> None:
        self._is_inside = False

    def end(self) -> None:
        """Stop watching."""
        self._has_ended.set()

    def _watch(self) -> None:
        pause, waited, block = min(1., self.seconds / 4), 0., 0
        while not self._has_ended.wait(pause):
            is_same = self._is_inside and self._block == block
            waited, block = (waited + pause if is_same else 0.), self._block
            if waited >= self.seconds:
                self.is_exceeded = True
                self.act()
                return
