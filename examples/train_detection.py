#!/usr/bin/env python3
"""Train a detector on data in COCO format, by default on generated scenes of handwritten digits.

    python examples/train_detection.py

    python examples/train_detection.py --data-path COCO --train-split train2017 --val-split val2017 \\
        --detector fasterrcnn --backbone smpconv_t --pretrained --returned-layers 1 2 3 4 --out-channels 256 \\
        --min-size 800 --max-size 1333 --hflip 0.5 --epochs 12 --lr 1e-4 --sched multistep --milestones 8 11 --amp
    torchrun --nproc_per_node 4 examples/train_detection.py ...      on 4 GPUs, or processes on a CPU

The data are COCO/SPLIT/IMAGES and COCO/annotations/instances_SPLIT.json, which are validated first. The script prints a
row per epoch. After each epoch it writes last.pth and metrics.json to the folder --output. At the end it writes
detections.png, with validation images, their targets and the detections. --resume continues from last.pth; on a CPU the
result has the same bits as without the interruption.

Exit codes: 0 done, 1 failed, 2 wrong arguments or data, 130 interrupted.
"""
import argparse
import importlib.util
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from smpconv_models.utils.errors import first_line

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # before torch loads OpenMP: no spinning threads

import coco_folder
import digit_scenes
import torch
from coco_folder import CocoFolder
from timm.optim import create_optimizer_v2, get_optimizer_class
from timm.scheduler import create_scheduler_v2
from timm.utils import distribute_bn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.transforms import v2
from tqdm import tqdm

import smpconv_models
from smpconv_models import checkpoint, detection
from smpconv_models.training import DebugOptions, DistributedContext, cli, describe_error, param_groups
from smpconv_models.utils import streams

DETECTORS = {'fasterrcnn': detection.fasterrcnn, 'fcos': detection.fcos, 'retinanet': detection.retinanet}
# Arguments that must not change when a run is resumed.
FIXED = (
    'detector', 'backbone', 'pretrained', 'trainable_layers', 'returned_layers', 'out_channels', 'extra_levels',
    'min_size', 'max_size', 'epochs', 'batch_size', 'opt', 'lr', 'weight_decay', 'momentum', 'sched', 'milestones',
    'warmup_epochs', 'clip_grad', 'seed', 'amp', 'amp_dtype')
SHOWN = 16  # images in the picture


def create_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog='train_detection.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    add = partial(_add, parser.add_argument_group('data'))
    add('--data-path', type=Path, metavar='FOLDER', help='data set in COCO format; digit scenes if not given')
    add('--train-split', default='train', metavar='NAME', help='folder of the training images')
    add('--val-split', default='val', metavar='NAME', help='folder of the validation images')
    add('--skip-empty-boxes', action='store_true', help='skip annotations whose box has no area')
    add('--hflip', type=cli.unit_float, default=0., metavar='P', help='probability of mirroring a training image')
    add('--workers', type=cli.non_negative_int, default=1, metavar='N', help='DataLoader workers')
    add = partial(_add, parser.add_argument_group('model'))
    add('--detector', choices=DETECTORS, default='fcos', help="torchvision's detector")
    add('--backbone', default='smpconv_nano', metavar='NAME', help="network of this package or of timm")
    add('--pretrained', action='store_true', help='load pretrained weights of the backbone and freeze its batch norms')
    add('--trainable-layers', type=cli.non_negative_int, metavar='N',
        help='layers of the backbone to train; by default 3 with --pretrained, otherwise all')
    add('--returned-layers', type=cli.positive_int, nargs='+', default=[2, 3, 4], metavar='N',
        help='stages of the feature pyramid')
    add('--out-channels', type=cli.positive_int, default=64, metavar='N', help='channels of the pyramid')
    add('--extra-levels', choices=('pool', 'p6p7'), default='pool', help='coarser levels of the pyramid')
    add('--grad-checkpointing', action='store_true', help='recompute activations: less memory, more time')
    add('--min-size', type=cli.positive_int, default=128, metavar='PIXELS', help='shorter side of the resized images')
    add('--max-size', type=cli.positive_int, default=128, metavar='PIXELS', help='limit of the longer side')
    add = partial(_add, parser.add_argument_group('training'))
    add('--epochs', type=cli.positive_int, default=10, metavar='N', help='number of epochs')
    add('--batch-size', type=cli.positive_int, default=8, metavar='N', help='batch size per process')
    add('--opt', default='adamw', metavar='NAME', help="timm's optimizer, e.g. sgd")
    add('--lr', type=cli.positive_float, default=2e-3, metavar='LR', help='learning rate')
    add('--weight-decay', type=cli.non_negative_float, default=0.05, metavar='W', help='weight decay')
    add('--momentum', type=cli.unit_float, default=0.9, metavar='M', help='momentum of sgd')
    add('--sched', choices=('cosine', 'multistep'), default='cosine',
        help='learning rate schedule after a linear warm-up')
    add('--milestones', type=cli.positive_int, nargs='+', metavar='EPOCH', help='epochs of --sched multistep (8 11)')
    add('--warmup-epochs', type=cli.non_negative_float, default=1., metavar='N', help='epochs of warm-up')
    add('--clip-grad', type=cli.positive_float, default=10., metavar='NORM', help='limit of the gradient norm')
    add('--seed', type=cli.non_negative_int, default=0, metavar='N', help='random seed')
    add('--eval-interval', type=cli.positive_int, default=5, metavar='N', help='epochs between evaluations')
    add = partial(_add, parser.add_argument_group('run'))
    add('--output', type=Path, default=Path('output/detection'), metavar='FOLDER', help='folder of the run')
    add('--resume', action='store_true', help='resume from last.pth in the output folder')
    add('--device', metavar='NAME', help='device; by default cuda if available, otherwise cpu')
    add('--amp', action='store_true', help='use automatic mixed precision')
    add('--amp-dtype', choices=('bfloat16', 'float16'), default='bfloat16', help='dtype of --amp')
    add('--dist-timeout', type=cli.positive_float, default=600., metavar='S', help='seconds to wait for other ranks')
    cli.add_options(parser, DebugOptions)
    return parser


def _add(group: Any, name: str, help: str, **kwargs: Any) -> None:
    has_default = kwargs.get('default') not in (None, 0., True, False)
    group.add_argument(name, help=f'{help} (%(default)s)' if has_default else help, **kwargs)


# --- data, model and state of a run ---


def check_requirements(args: argparse.Namespace) -> None:
    """Raise ValueError if packages, files of the data or the optimizer are missing, which is found at once."""
    needed = ['matplotlib', 'pycocotools', *(['scipy', 'sklearn'] if args.data_path is None else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"packages are missing: {', '.join(missing)}; pip install '.[detection]' installs them")
    if args.data_path is not None:
        for split in (args.train_split, args.val_split):
            for path in (coco_folder.annotation_file(args.data_path, split), args.data_path / split):
                if not path.exists():
                    raise ValueError(f'{path} does not exist: --data-path needs SPLIT/IMAGES and '
                                     'annotations/instances_SPLIT.json')
    get_optimizer_class(args.opt)


class ErrorsAsSamples(Dataset):
    """Data set that returns its errors in place of samples: a DataLoader worker would make texts of them."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.data[index]
        except (OSError, ValueError) as error:
            return error


class Loader(DataLoader):
    """DataLoader of lists of images, which may differ in size, and of targets; it raises the errors of the data set."""

    def __init__(self, data: Any, batch_size: int = 1, **kwargs: Any) -> None:
        super().__init__(ErrorsAsSamples(data), batch_size, collate_fn=list, **kwargs)

    def __iter__(self) -> Any:
        for samples in super().__iter__():
            for sample in samples:
                if isinstance(sample, Exception):
                    raise sample
            images, targets = zip(*samples)
            yield list(images), list(targets)


def open_data(args: argparse.Namespace, world: DistributedContext) -> Tuple[CocoFolder, CocoFolder]:
    """Open the training and validation data; generate the digit scenes without --data-path."""
    folder = args.data_path or Path(args.output) / 'digits'
    if args.data_path is None:
        world.run_on_primary(lambda: digit_scenes.make(folder))
    augment = v2.Compose([
        v2.ToImage(), v2.RandomHorizontalFlip(args.hflip), v2.ColorJitter(brightness=0.2, contrast=0.2)])
    train = CocoFolder(folder, args.train_split, args.skip_empty_boxes, augment)
    val = CocoFolder(folder, args.val_split, args.skip_empty_boxes)
    if train.categories != val.categories:
        differing = sorted(set(train.categories.items()) ^ set(val.categories.items()))
        raise ValueError(f'{args.train_split} and {args.val_split} must have the same categories, but only one has '
                         f'{differing[:5]}')
    for data in (train, val):
        for record in data.coco.imgs.values():
            short, long = sorted((record['width'], record['height']))
            if int(short * min(args.min_size / short, args.max_size / long)) < 1:
                raise ValueError(
                    f'image {record["id"]}: {record["file_name"]} is too thin for --max-size {args.max_size}, got '
                    f'{record["width"]}x{record["height"]} pixels')
    if len(train) < args.batch_size * world.size:
        raise ValueError(f'a step needs {args.batch_size * world.size} training images, got {len(train)}')
    return train, val


def create_backbone(args: argparse.Namespace) -> detection.FPNBackbone:
    extra = LastLevelP6P7(args.out_channels, args.out_channels) if args.extra_levels == 'p6p7' else None
    try:
        backbone = detection.fpn_backbone(
            args.backbone, args.pretrained, args.trainable_layers, args.returned_layers, args.out_channels, extra)
    except RuntimeError as error:  # timm's error for missing pretrained weights
        raise ValueError(f'--backbone {args.backbone}: {first_line(error)}') from error
    if args.grad_checkpointing:
        backbone.set_grad_checkpointing()
    return backbone


class Run:
    """Model, optimizer, schedule and data of a run.

    Raises:
        ValueError: If the data, the backbone or the checkpoint do not fit the arguments.
    """

    def __init__(self, args: argparse.Namespace, world: DistributedContext) -> None:
        self.args, self.world = args, world
        self.last = args.output / 'last.pth'
        self._check_output()
        check_requirements(args)
        self.device = _device(args.device)
        if self.device.type == 'cuda' and world.size > 1:
            self.device = torch.device('cuda', world.local_rank)
        world.init(self.device, args.dist_timeout)
        torch.manual_seed(args.seed)
        backbone = create_backbone(args)  # before the data, which may take long to make or to validate
        self.train_data, self.val_data = open_data(args, world)
        self.model: torch.nn.Module = DETECTORS[args.detector](
            backbone, 1 + len(self.train_data.categories), min_size=args.min_size, max_size=args.max_size)
        self.model.to(self.device)
        self.model.to(memory_format=torch.channels_last)  # saves a fifth of a step's time on the digits on a CPU
        self.optimizer = create_optimizer_v2(
            param_groups(self.model, args.weight_decay), opt=args.opt, lr=args.lr, weight_decay=args.weight_decay,
            momentum=args.momentum)
        self.dtype = getattr(torch, args.amp_dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.amp and self.dtype == torch.float16)
        self.sampler: Any = DistributedSampler(self.train_data, world.size, world.rank, seed=args.seed, drop_last=True)
        self.loader = self._loader(self.train_data, sampler=self.sampler, drop_last=True)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, args.sched, num_epochs=args.epochs, decay_milestones=args.milestones or [8, 11],
            warmup_epochs=args.warmup_epochs, warmup_lr=args.lr / 1000, step_on_epochs=False,
            updates_per_epoch=len(self.loader))
        self.rows: List[Dict[str, Any]] = []
        world.run_on_primary(partial(args.output.mkdir, parents=True, exist_ok=True))
        if args.resume:
            self._load()
        self.wrapped: Any = self.model
        if world.size > 1:
            ids = None if self.device.type == 'cpu' else [self.device]
            self.wrapped = DistributedDataParallel(self.model, device_ids=ids)

    def _check_output(self) -> None:
        if self.args.resume and not self.last.exists():
            raise ValueError(f'cannot resume: {self.last} does not exist')
        if not self.args.resume and self.last.exists():
            raise ValueError(f'{self.args.output} has a run: give --resume, or another --output')
        if self.args.warmup_epochs >= self.args.epochs:
            raise ValueError(f'--warmup-epochs must be below the {self.args.epochs} epochs, '
                             f'got {self.args.warmup_epochs:g}')
        milestones = self.args.milestones or []
        if milestones != sorted(set(milestones)) or (milestones and self.args.sched != 'multistep'):
            raise ValueError(f'--milestones are ascending epochs of --sched multistep, got {milestones} and '
                             f'{self.args.sched}')
        if self.args.min_size > self.args.max_size:
            raise ValueError(f'--min-size must be at most --max-size, got {self.args.min_size} and '
                             f'{self.args.max_size}')

    def _loader(self, data: Any, **kwargs: Any) -> DataLoader:
        return Loader(
            data, self.args.batch_size, num_workers=self.args.workers,
            pin_memory=self.device.type == 'cuda', worker_init_fn=self.world.worker_init_fn, **kwargs)

    def _settings(self) -> Dict[str, Any]:
        return {**{name: getattr(self.args, name) for name in FIXED}, 'categories': self.train_data.categories}

    def _load(self) -> None:
        state: Any = checkpoint.load_file(self.last)
        now = self._settings()
        try:
            stopped, self.rows = dict(state['settings']), list(state['rows'])
            differing = next((name for name in now if stopped[name] != now[name]), None)
            if differing is None:
                self.model.load_state_dict(state['model'])
                self.optimizer.load_state_dict(state['optimizer'])
                self.scaler.load_state_dict(state['scaler'])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f'{self.last} is not a checkpoint of this program: {first_line(error)}') from error
        if differing is not None:
            raise ValueError(f'{self.last} was trained with {differing} {stopped[differing]}, got {now[differing]}')

    def save(self) -> None:
        """Write last.pth and metrics.json atomically."""
        state = {
            'model': self.model.state_dict(), 'optimizer': self.optimizer.state_dict(),
            'scaler': self.scaler.state_dict(), 'rows': self.rows, 'settings': self._settings()}
        replace(self.last, lambda path: torch.save(state, path))
        replace(self.args.output / 'metrics.json', lambda path: path.write_text(json.dumps(self.rows, indent=2) + '\n'))

    # --- training ---

    def train_epoch(self, epoch: int) -> float:
        """Train one epoch and return the mean loss."""
        self.sampler.set_epoch(epoch)
        torch.manual_seed(hash((self.args.seed, epoch, self.world.rank)))  # the same after a resume
        self.wrapped.train()
        sum_of_losses = torch.zeros((), device=self.device)
        bar = tqdm(self.loader, desc=f'epoch {epoch + 1}', leave=False, disable=None if self.world.is_primary else True)
        for step, (images, targets) in enumerate(bar, epoch * len(self.loader)):
            self.scheduler.step_update(step)
            sum_of_losses += self.train_step(images, targets)
        if self.world.size > 1:
            distribute_bn(self.model, self.world.size, reduce=True)  # all ranks evaluate with the same statistics
        return self.world.sum(sum_of_losses)[0] / len(self.loader) / self.world.size

    def train_step(self, images: List[torch.Tensor], targets: List[Dict[str, Any]]) -> torch.Tensor:
        """Run one optimizer step and return the loss.

        Raises:
            FloatingPointError: If the loss or the gradient of any rank is not finite; the model stays unchanged.
        """
        with torch.autocast(self.device.type, self.dtype, enabled=self.args.amp):
            losses = self.wrapped([image.to(self.device) for image in images], [
                {name: target[name].to(self.device) for name in ('boxes', 'labels')} for target in targets])
        loss = sum(value.float() for value in losses.values())
        if not torch.tensor(self.world.sum(loss)).isfinite():
            own = f'{loss.item():g} for images {[target["image_id"] for target in targets]}'
            raise FloatingPointError(f'the loss is not finite: {own}; a lower --lr may help')
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip_grad)
        if not norm.isfinite() and not self.scaler.is_enabled():  # the scaler skips such a step
            raise FloatingPointError(f'the gradient is not finite: its norm is {norm:g}; a lower --lr may help')
        self.scaler.step(self.optimizer)
        self.scaler.update()
        smpconv_models.clip_radius_(self.model)
        return loss.detach()

    # --- evaluation ---

    @torch.no_grad()
    def detect(self, data: Any, desc: str) -> Iterator[Tuple[Any, Any, Any]]:
        """Yield each image with its target and detections, in float32."""
        self.model.eval()
        for images, targets in tqdm(
                self._loader(data), desc=desc, leave=False, disable=None if self.world.is_primary else True):
            yield from zip(images, targets, self.model([image.to(self.device) for image in images]))

    def evaluate(self) -> Dict[str, float]:
        """Return COCO's metrics of the validation images, which are divided among the ranks."""
        own = range(self.world.rank, len(self.val_data), self.world.size)
        results = [
            result for _, target, detected in self.detect(Subset(self.val_data, own), 'validation images')
            for result in self.val_data.results(target['image_id'], detected)]
        if self.world.size > 1:
            gathered: List[Any] = [None] * self.world.size
            dist.all_gather_object(gathered, results)
            results = [result for part in gathered for result in part]
        return self.val_data.metrics(results)

    def save_picture(self) -> Path:
        import detection_picture  # imported here, as check_requirements looks for matplotlib first
        path = self.args.output / 'detections.png'
        shown = Subset(self.val_data, range(min(SHOWN, len(self.val_data))))
        samples = [
            (image, target, {name: value.cpu() for name, value in detected.items()})
            for image, target, detected in self.detect(shown, 'picture')]
        names = ['background', *self.val_data.categories.values()]
        replace(path, lambda part: detection_picture.save_detections(part, samples, names))
        return path


def _device(name: Optional[str]) -> torch.device:
    device = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f'--device {device} cannot be used here: {first_line(error)}') from error


def replace(path: Path, write: Any) -> None:
    """Write a temporary file beside ``path`` and rename it once it is complete and on the disk."""
    part = path.with_name(f'.{path.name}.part')
    try:
        write(part)
        with open(part, 'rb+') as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# --- the run ---


def train(run: Run) -> Dict[str, float]:
    """Train the remaining epochs and return the metrics of the last one."""
    args, is_first = run.args, run.world.is_primary
    if is_first:
        print(f'{len(run.train_data)} training images, {len(run.val_data)} validation images, '
              f'{len(run.train_data.categories)} classes, {len(run.loader)} steps an epoch')
        if run.train_data.skipped or run.val_data.skipped:
            print(f'skipped annotations without an area: {run.train_data.skipped} and {run.val_data.skipped}')
        print('epoch     loss       AP     AP50   seconds', flush=True)
    for epoch in range(len(run.rows), args.epochs):
        start = time.perf_counter()
        row: Dict[str, Any] = {'epoch': epoch + 1, 'loss': run.train_epoch(epoch)}
        if (epoch + 1) % args.eval_interval == 0 or epoch + 1 == args.epochs:
            row.update(run.evaluate())
        row['seconds'] = time.perf_counter() - start
        run.rows.append(row)
        run.world.run_on_primary(run.save)
        if is_first:
            metrics = '  '.join(f'{row[name]:7.3f}' if name in row else f'{"":7}' for name in ('AP', 'AP50'))
            print(f'{row["epoch"]:5}  {row["loss"]:7.4f}  {metrics}  {row["seconds"]:8.1f}', flush=True)
    return {name: run.rows[-1][name] for name in coco_folder.METRICS}


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = create_parser()
    args = parser.parse_args(argv)
    cli.set_debug_logging(args.debug)
    world = DistributedContext.from_environment()
    run = None
    try:
        run = Run(args, world)
        metrics = train(run)
        picture = world.run_on_primary(run.save_picture)
        world.destroy()
    except KeyboardInterrupt:
        parser.exit(130, f'{parser.prog}: interrupted; --resume continues after the last saved epoch\n')
    except Exception as error:
        line = describe_error(error, world, args.batch_size, args.workers)
        if line is None:
            raise
        is_wrong = run is None and isinstance(error, (OSError, ValueError))
        parser.exit(2 if is_wrong else 1, f'{parser.prog}: error: {line}\n')
    finally:
        world.worker_init_fn.release()
    if world.is_primary:
        print('\nvalidation images, by pycocotools')
        for name, value in metrics.items():
            print(f'  {name:10} {value:6.3f}')
        print(f'checkpoint: {run.last}\npicture: {picture}')
    return 0


if __name__ == '__main__':
    streams.keep_writable()
    sys.exit(main())
