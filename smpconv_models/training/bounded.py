"""DataLoaders with a limit on each wait for their workers."""
import threading
from contextlib import suppress
from typing import Any, Callable, Iterator, List, Optional

from torch.utils.data import DataLoader

# Seconds for workers to end after the request to end, and for a killed worker to end.
_GRACE = 3.


class BoundedLoader:
    """DataLoader that kills its workers if they do not respond.

    PyTorch's own timeout does not cover a worker that stops while it hands over a batch, while an epoch begins, or
    when the workers should end.

    Args:
        loader: DataLoader with persistent workers, or without workers.
        seconds: Limit of each wait for the workers.
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
        """Yield the batches.

        Raises:
            TimeoutError: If the workers gave no batch within the limit.
        """
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
        except (EOFError, OSError, RuntimeError):  # as PyTorch notices that a worker died
            if not limit.is_exceeded:
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
        shutdown.join(_GRACE)
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
            worker.join(_GRACE)


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
