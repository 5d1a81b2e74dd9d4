"""Loaders of batches, for training in an order that (seed, epoch, step) determine, for evaluation in order."""
import logging
from functools import partial
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

import torch
from timm.data.loader import PrefetchLoader, fast_collate
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, default_collate

from .config import AugmentationOptions
from .datasets import (
    CheckedLoader,
    OnUnreadable,
    ResumableBatchSampler,
    SeededIterableDataset,
    SkippedSamples,
    collate_readable,
)
from .distributed import DistributedContext
from .tasks import Task

_logger = logging.getLogger(__name__)


class TrainLoader(NamedTuple):
    """Batches of the training samples.

    Attributes:
        loader: Loader of (images, class indices).
        dataset: Data set of the samples.
        order: Order of the batches; a stream is its own.
        steps: Number of steps of an epoch.
        accumulation: Number of batches of a step.
    """
    loader: Any
    dataset: Any
    order: Union[ResumableBatchSampler, SeededIterableDataset]
    steps: int
    accumulation: int

    @property
    def num_images(self) -> Optional[int]:
        """Number of training images; None for a stream."""
        return self.dataset.num_images

    def start(self, epoch: int, step: int) -> Iterator[Tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch from this step on. A stream is shuffled again if it resumes within an epoch.

        Raises:
            ValueError: If the batches end early, because of unreadable samples.
        """
        self.order.start(epoch, step)
        return self._iter_batches((self.steps - step) * self.accumulation)

    def _iter_batches(self, count: int) -> Iterator[Tuple[Tensor, Tensor]]:
        done = 0
        while done < count:
            before = done
            for batch in self.loader:
                yield batch
                done += 1
                if done == count:
                    return
            if not self.dataset.is_stream or done == before:
                raise ValueError(f'the images ended after {done} of {count} batches, as too many cannot be read')
            _logger.warning('the stream ended after %d of %d batches, and starts again', done, count)

    def names(self, step: int) -> List[str]:
        """Return the names of this rank's images in a step of the current epoch; none for a stream."""
        return [self.dataset.name(index) for index in self.order.indices(step)]


class EvalLoader(NamedTuple):
    """Batches of the evaluation samples.

    Attributes:
        loader: Loader of (images, class indices).
        world: Ranks that the samples are divided among; a single one for a stream, which each rank evaluates whole.
        skipped: Unreadable samples of this rank.
        num_samples: Number of samples in the split.
        dataset: Data set of the samples.
    """
    loader: Any
    world: DistributedContext
    skipped: SkippedSamples
    num_samples: int = 0
    dataset: Any = None

    def num_skipped(self, count: int) -> int:
        """Return how many samples were skipped if this many were evaluated on all ranks."""
        return max(self.num_samples - count, 0)


def create_train_loader(
        task: Task, dataset: Any, data_config: Dict[str, Any], augmentation: AugmentationOptions, device: torch.device,
        world: DistributedContext, on_unreadable: OnUnreadable, *, grad_accum_steps: int, dist_timeout: float,
        train_split: str, balance_classes: bool = False) -> TrainLoader:
    """Create the loader of shuffled and augmented training samples; those that do not fill a step are left out.

    Args:
        task: Task with the options of the data set.
        dataset: Data set of the task.
        data_config: Data configuration of the task.
        augmentation: Options of the augmentation.
        device: Device of the model; timm's prefetcher copies batches to a GPU ahead of time.
        world: Ranks that share the data set.
        on_unreadable: Function that is called with the unreadable samples of a batch.
        grad_accum_steps: Number of batches that a rank accumulates in a step.
        dist_timeout: Seconds to wait for DataLoader workers.
        train_split: Name of the split, for errors.
        balance_classes: Whether to sample each class equally often.

    Raises:
        ValueError: If a step takes more samples than there are, the classes of samples are not known without reading
            them and should be balanced, a stream has too few shards for the DataLoader
            workers, or the augmentation is not supported.
    """
    data = task.data
    task.prepare_training(dataset, data_config, augmentation, _use_prefetcher(task, device))
    if dataset.num_samples < data.batch_size * grad_accum_steps * world.size:
        raise ValueError(
            f'--batch-size must not exceed the {dataset.num_samples} training images, got {data.batch_size}'
            + (f' x {grad_accum_steps} accumulated' if grad_accum_steps > 1 else '')
            + (f' x {world.size} ranks' if world.size > 1 else ''))
    if balance_classes and (dataset.is_stream or dataset.targets is None):
        raise ValueError(
            f'--balance-classes needs class indices without decoding, which {data.dataset} lacks: leave it out')
    batching: Dict[str, Any]
    if dataset.is_stream:
        num_shards, num_workers = dataset.num_shards(data.workers, world.size), max(data.workers, 1)
        if num_shards is not None and num_shards < num_workers:  # a worker without a shard would let others wait
            raise ValueError(
                f'split {train_split!r} of {data.dataset} has {num_shards} shards for each rank, fewer than '
                f'{num_workers} DataLoader workers: use fewer --workers or fewer ranks')
        dataset.configure(data.workers, world.rank)
        order, steps = dataset, len(dataset) // data.batch_size // grad_accum_steps
        batching = {'batch_size': data.batch_size, 'drop_last': True}
    else:
        order = ResumableBatchSampler(
            len(dataset), data.batch_size, grad_accum_steps, world.rank, world.size, data.seed,
            dataset.targets if balance_classes else None)
        steps, batching = order.steps, {'batch_sampler': order}
    loader = _create_loader(
        task, dataset, data_config, device, world, dist_timeout, on_unreadable, batching,
        filled_size=data.batch_size, re_prob=0. if augmentation.no_aug else augmentation.reprob,
        re_mode=augmentation.remode, re_count=augmentation.recount)
    return TrainLoader(loader, dataset, order, steps, grad_accum_steps)


def create_eval_loader(
        task: Task, dataset: Any, data_config: Dict[str, Any], device: torch.device, world: DistributedContext, *,
        dist_timeout: float) -> EvalLoader:
    """Create the loader of the evaluation samples in order, each on one rank; those of a stream on every rank.

    Arguments are those of :func:`create_train_loader`.
    """
    data = task.data
    task.prepare_evaluation(dataset, data_config, _use_prefetcher(task, device))
    batch_size, skipped = data.validation_batch_size or data.batch_size, SkippedSamples(strict=not data.skip_unreadable)
    num_samples, expected = dataset.num_samples, None
    batching: Dict[str, Any]
    if dataset.is_stream:
        dataset.configure(data.workers, rank=0)
        batching, expected = {'batch_size': batch_size}, num_samples
    else:
        keys: Any = [(0, index) for index in range(world.rank, num_samples, world.size)]
        batching = {'batch_sampler': BatchSampler(keys, batch_size, drop_last=False)}
    loader = _create_loader(
        task, dataset, data_config, device, world, dist_timeout, skipped, batching, expected=expected)
    return EvalLoader(loader, DistributedContext() if dataset.is_stream else world, skipped, num_samples, dataset)


def _use_prefetcher(task: Task, device: torch.device) -> bool:
    """Return whether timm's prefetcher, which exists for accelerators, copies and normalizes the batches."""
    return device.type == 'cuda' and not task.data.no_prefetcher and task.supports_prefetcher


def _create_loader(
        task: Task, dataset: Any, data_config: Dict[str, Any], device: torch.device, world: DistributedContext,
        dist_timeout: float, on_unreadable: OnUnreadable, batching: Dict[str, Any], filled_size: Optional[int] = None,
        expected: Optional[int] = None, **erasing: Any) -> Any:
    data, use_prefetcher = task.data, _use_prefetcher(task, device)
    collate = fast_collate if use_prefetcher else default_collate
    loader = world.bounded_loader(DataLoader(
        dataset,
        collate_fn=partial(collate_readable, collate=collate, size=filled_size),
        num_workers=data.workers,
        persistent_workers=data.workers > 0,
        pin_memory=data.pin_mem and device.type == 'cuda',
        worker_init_fn=world.worker_init_fn,
        **batching,
    ), dist_timeout)
    checked: Any = CheckedLoader(loader, on_unreadable, data_config.get('num_classes'), expected)
    if not use_prefetcher:
        return checked
    return PrefetchLoader(
        checked, mean=data_config['mean'], std=data_config['std'], channels=data_config['input_size'][0],
        device=device, **erasing)
