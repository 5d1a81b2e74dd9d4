"""Batches of images: for training by key, for evaluation each once."""
import logging
from argparse import Namespace
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from timm.data import IterableImageDataset, create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from . import augment, rng, task_sequence
from .bounded import BoundedLoader
from .datasets import Batches, Collate, InOrder, Loader, Samples, Stream, is_hugging_face, is_webdataset
from .distributed import DistributedContext
from .metrics import EvalLoader
from .skipped import ERRORS, SkippedInEvaluation, Unreadable

_logger = logging.getLogger(__name__)

Tell = Callable[[List[Unreadable]], None]


class Images(NamedTuple):
    """A run's training images.

    Attributes:
        loader: Of (images, class indices).
        steps: Of an epoch.
        samples: Single ones, unless they come in a stream.
        batches: Their order, unless they come in a stream.
        stream: The data set that decides on the order itself.
        accumulation: Batches of a step.
    """
    loader: Any
    steps: int
    samples: Optional[Samples] = None
    batches: Optional[Batches] = None
    stream: Optional[Stream] = None
    accumulation: int = 1

    def start(self, epoch: int, step: int) -> Iterator[Tuple[Tensor, Tensor]]:
        """The batches of an epoch, from this step. A stream is shuffled anew where it goes on inside an epoch.

        Raises:
            ValueError: They end too early, for images that can't be read.
        """
        if self.batches is not None:
            self.batches.start(epoch, step)
        elif self.stream is not None:
            self.stream.start(rng.key(epoch, step) % 2 ** 31 if step else epoch)
        return self._exactly((self.steps - step) * self.accumulation)

    def _exactly(self, count: int) -> Iterator[Tuple[Tensor, Tensor]]:
        done = 0
        while done < count:
            before = done
            for batch in self.loader:
                yield batch
                done += 1
                if done == count:
                    return
            if self.stream is None or done == before:
                raise ValueError(f'the images ended after {done} of {count} batches, as too many cannot be read')
            _logger.warning('the stream ended after %d of %d batches, and begins anew', done, count)

    def names(self, step: int) -> List[str]:
        """The image files of a step of the epoch that was started; a stream knows none."""
        if self.samples is None or self.batches is None:
            return []
        return [
            self.samples.name(index) for part in range(self.batches.accumulation)
            for _, index in self.batches.batch(step, part)]


def train_loader(
        args: Namespace,
        dataset: Any,
        config: Dict[str, Any],
        device: torch.device,
        world: DistributedContext,
        tell: Tell,
) -> Images:
    """The training images: shuffled and augmented by key, what fills no step left out.

    Args:
        args: The batch size and the augmentation.
        dataset: timm's, or any map-style one.
        config: From :func:`~smpconv_models.training.data_config.data_config`.
        device: The loader copies to it ahead of time if it is a GPU.
        world: The processes that share the data set.
        tell: Called with the images that could not be read.

    Raises:
        ValueError: A step takes more images than there are, or the augmentation is none of timm's or not for these.
    """
    if not task_sequence.are_meant(args):
        dataset.transform = _train_transform(args, config, device)
    erasing = dict(re_prob=0. if args.no_aug else args.reprob, re_mode=args.remode, re_count=args.recount)
    if isinstance(dataset, IterableImageDataset):
        return _stream(args, dataset, config, device, world, tell, erasing)
    if args.crop_padding is not None:
        _check_size(dataset)
    batches = Batches(len(dataset), args.batch_size, args.grad_accum_steps, world.rank, world.size, args.seed)
    if batches.steps == 0:
        raise ValueError(
            f'--batch-size must not exceed the {len(dataset)} training images, got {args.batch_size}'
            + (f' x {args.grad_accum_steps} accumulated' if args.grad_accum_steps > 1 else '')
            + (f' x {world.size} processes' if world.size > 1 else ''))
    samples = Samples(dataset, args.seed, fills=True)
    collate = Collate(_collate(args, device), args.batch_size)
    loader = _loader(args, samples, device, world, collate, batch_sampler=batches)
    loader = _on_device(args, Loader(loader, tell, config.get('num_classes')), config, device, **erasing)
    return Images(loader, batches.steps, samples, batches, accumulation=args.grad_accum_steps)


def _check_size(dataset: Any) -> None:
    """Images of another size are told before there is a run; one that can't be read, in its turn."""
    try:
        dataset[0]
    except augment.OtherSizeError:
        raise
    except ERRORS as error:
        _logger.debug('the first image cannot be read: %s', error)


def _train_transform(args: Namespace, config: Dict[str, Any], device: torch.device) -> Any:
    """timm's augmentation."""
    try:
        transform = create_transform(
            config['input_size'],
            is_training=True,
            use_prefetcher=_prefetches(args, device),
            no_aug=args.no_aug,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            vflip=args.vflip,
            color_jitter=args.color_jitter,
            auto_augment=args.aa,
            interpolation=args.train_interpolation or config['interpolation'],
            mean=config['mean'],
            std=config['std'],
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
        )
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f'the images cannot be augmented so: {type(error).__name__} {error}') from error
    transform = augment.repair(transform)
    if args.crop_padding is not None and not args.no_aug:
        augment.crop_padded(transform, config['input_size'], args.crop_padding)
    return transform


def held_out(
        args: Namespace,
        dataset: Any,
        config: Dict[str, Any],
        device: torch.device,
        world: DistributedContext,
) -> EvalLoader:
    """The evaluation images, in order, each in one process once; a stream's all in every process.

    Args:
        args: The batch size.
        dataset: timm's.
        config: From :func:`~smpconv_models.training.data_config.data_config`.
        device: The loader copies to it ahead of time if it is a GPU.
        world: The processes that share the data set.
    """
    batch_size = args.validation_batch_size or args.batch_size
    if not task_sequence.are_meant(args):
        dataset.transform = create_transform(
            config['input_size'],
            use_prefetcher=_prefetches(args, device),
            interpolation=config['interpolation'],
            mean=config['mean'],
            std=config['std'],
            crop_pct=config['crop_pct'],
            crop_mode=config['crop_mode'],
        )
    collate = Collate(_collate(args, device))
    expected = None
    if isinstance(dataset, IterableImageDataset):
        dataset.set_loader_cfg(num_workers=max(args.workers, 1))
        loader = _loader(args, Stream(dataset), device, world, collate, batch_size=batch_size)
        expected = dataset.reader.num_samples
        world = DistributedContext()
    else:
        order = InOrder(len(dataset), batch_size, world.rank, world.size)
        loader = _loader(args, Samples(dataset, args.seed), device, world, collate, batch_sampler=order)
    left_out = SkippedInEvaluation(args)
    told = Loader(loader, left_out, config.get('num_classes'), expected)
    return EvalLoader(_on_device(args, told, config, device), world, left_out)


def _stream(
        args: Namespace,
        dataset: IterableImageDataset,
        config: Dict[str, Any],
        device: torch.device,
        world: DistributedContext,
        tell: Tell,
        erasing: Dict[str, Any],
) -> Images:
    _check_stream(args, dataset.reader, world)
    dataset.set_loader_cfg(num_workers=max(args.workers, 1))
    collate = Collate(_collate(args, device), args.batch_size)
    stream = Stream(dataset, args.seed, world.rank)
    loader = _loader(args, stream, device, world, collate, batch_size=args.batch_size, drop_last=True)
    steps = len(loader) // args.grad_accum_steps
    loader = _on_device(args, Loader(loader, tell, config.get('num_classes')), config, device, **erasing)
    return Images(loader, steps, stream=stream, accumulation=args.grad_accum_steps)


def _check_stream(args: Namespace, reader: Any, world: DistributedContext) -> None:
    """A stream's parts are divided among the processes that load, and one without any would leave others waiting."""
    images, step = reader.num_samples, args.batch_size * args.grad_accum_steps * world.size
    if images < step:
        raise ValueError(f'--batch-size must not exceed the {images} training images, got {step} over all processes')
    shards, loading = None, max(args.workers, 1)
    if is_webdataset(reader):
        shards, loading = len(reader.split_info.filenames), loading * world.size
    elif is_hugging_face(reader) and not reader.download and args.workers > 1:
        shards = _count_shards(args, reader)
        shards //= 1 if shards % world.size else world.size
    if shards is not None and shards < loading:
        raise ValueError(
            f'--workers {args.workers}' + (f' x {world.size} processes' if world.size > 1 else '')
            + f' must not exceed the shards of {args.dataset}, split {args.train_split!r}: there are {shards}')


def _count_shards(args: Namespace, reader: Any) -> int:
    try:
        return reader.builder.as_streaming_dataset(split=reader.split).num_shards
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f'{args.dataset}, split {args.train_split!r}, cannot be read: {error}') from error


def _prefetches(args: Namespace, device: torch.device) -> bool:
    """timm's prefetcher copies images to the device ahead of time, normalizes there, and exists for accelerators."""
    return device.type == 'cuda' and not args.no_prefetcher and not task_sequence.are_meant(args)


def _collate(args: Namespace, device: torch.device) -> Any:
    return fast_collate if _prefetches(args, device) else default_collate


def _loader(
        args: Namespace,
        dataset: Any,
        device: torch.device,
        world: DistributedContext,
        collate: Collate,
        **batching: Any,
) -> BoundedLoader:
    return world.bounded_loader(DataLoader(
        dataset,
        collate_fn=collate,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        pin_memory=args.pin_mem and device.type == 'cuda',
        worker_init_fn=world.worker_init_fn,
        **batching,
    ), args.dist_timeout)


def _on_device(args: Namespace, loader: Any, config: Dict[str, Any], device: torch.device, **erasing: Any) -> Any:
    if not _prefetches(args, device):
        return loader
    return PrefetchLoader(
        loader, mean=config['mean'], std=config['std'], channels=config['input_size'][0], device=device, **erasing)
