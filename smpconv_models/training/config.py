"""Options of training and evaluation, as typed values under timm's names."""
import argparse
import math
import os
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Callable, ClassVar, Dict, List, Optional, Tuple, get_type_hints

import torch

from smpconv_models.checkpoint.description import INTERPOLATIONS

from .cli import (
    CheckedOptions,
    ParseKwargs,
    bounded_number,
    moderate_float,
    non_negative_float,
    non_negative_int,
    option,
    positive_float,
    positive_int,
    positive_unit_float,
    read_options,
    unit_float,
)

Sizes = Optional[List[int]]
Floats = Optional[List[float]]


@dataclass(frozen=True)
class DataOptions(CheckedOptions):
    """Options of the data set and of how images are read and prepared."""
    title: ClassVar[str] = 'data'

    data_dir: Optional[str] = option(None, 'folder of the data set', metavar='DIR')
    dataset: Optional[str] = option(
        None, "'digits' (embedded), torch/NAME, wds/NAME, hfds/NAME, tfds/NAME; seq/NAME for sequences, embedded "
        'seq/digits and seq/permuted-digits; without a name, --data-dir has a folder for each split with a folder for '
        'each class', metavar='NAME')
    dataset_download: bool = option(False, 'let torchvision or the Hub client download the data set')
    val_split_fraction: Optional[float] = option(
        None, 'validate on this fraction of the images of each class, in a --data-dir that has a folder for each class '
        'and none for the splits', type=bounded_number(float, 0.001, 0.999), metavar='X')
    batch_size: int = option(128, 'batch size of each rank', flags=('-b',), type=positive_int, metavar='N')
    validation_batch_size: Optional[int] = option(
        None, 'batch size of evaluation (default: --batch-size)', flags=('-vb',), type=positive_int, metavar='N')
    workers: int = option(
        min(4, os.cpu_count() or 1), 'number of DataLoader workers (default: 4, or the number of cores if there are '
        'fewer; timm: 4)', flags=('-j',), type=non_negative_int, metavar='N')
    pin_mem: bool = option(False, 'pin memory in the DataLoader')
    no_prefetcher: bool = option(False, "do not use timm's prefetcher on a GPU")
    skip_unreadable: bool = option(False, 'skip unreadable images in evaluation too, instead of an error')
    exif_orientation: Optional[bool] = option(
        None, 'apply the EXIF orientation of images (default: no in training; in evaluation as in training)',
        action=argparse.BooleanOptionalAction)
    img_size: Optional[int] = option(
        None, "image side in pixels (default: the model's)", type=positive_int, metavar='N')
    input_size: Sizes = option(
        None, 'image size, instead of --img-size', type=positive_int, nargs=3, metavar=('C', 'H', 'W'))
    crop_pct: Optional[float] = option(
        None, "fraction of the resized image that evaluation crops (default: the model's)", type=positive_float,
        metavar='X')
    mean: Floats = option(
        None, "mean of each channel (default: the model's)", type=bounded_number(float, -math.inf), nargs='+',
        metavar='X')
    std: Floats = option(
        None, "standard deviation of each channel (default: the model's)", type=positive_float, nargs='+', metavar='X')
    interpolation: Optional[str] = option(
        None, "interpolation of resizing (default: the model's)", choices=INTERPOLATIONS)
    seed: int = option(42, 'random seed', type=bounded_number(int, 0, 2 ** 32 - 1), metavar='N')


@dataclass(frozen=True)
class ModelOptions(CheckedOptions):
    """Options of the network."""
    title: ClassVar[str] = 'model'

    model: Optional[str] = option(
        None, "name of a model of this package or of timm, or hf-hub:OWNER/NAME, local-dir:FOLDER", metavar='NAME')
    num_classes: Optional[int] = option(
        None, "number of classes (default: the data set's, otherwise the model's)", type=positive_int, metavar='N')
    in_chans: Optional[int] = option(
        None, 'number of image channels; 1 reads gray images', type=positive_int, metavar='N')
    model_kwargs: Dict[str, Any] = option(
        {}, "more arguments of the model's constructor", nargs='*', action=ParseKwargs, metavar='KEY=VALUE')


@dataclass(frozen=True)
class DeviceOptions(CheckedOptions):
    """Options of the device, precision and memory layout."""
    title: ClassVar[str] = 'device'

    device: Optional[str] = option(None, 'device (default: cuda if there is a GPU, otherwise cpu)', metavar='NAME')
    dist_timeout: float = option(
        600., 'seconds to wait for other ranks, and for DataLoader workers', type=moderate_float, metavar='S')
    amp: bool = option(False, 'automatic mixed precision')
    amp_dtype: str = option('float16', 'type of mixed precision', choices=('float16', 'bfloat16'))
    channels_last: bool = option(False, 'channels_last memory layout')

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory layout of images and weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """Return the context of mixed precision; no-op unless AMP is on."""
        return torch.autocast(device.type, dtype=getattr(torch, self.amp_dtype), enabled=self.amp)


@dataclass(frozen=True)
class DebugOptions(CheckedOptions):
    """Options of error messages."""
    title: ClassVar[str] = 'debugging'

    debug: bool = option(False, 'show the traceback behind an error, not its line alone')


@dataclass(frozen=True)
class RunOptions(CheckedOptions):
    """Options of a training run."""
    title: ClassVar[str] = 'training'

    train_split: str = option('train', 'split to train on', metavar='NAME')
    val_split: str = option('validation', 'split to evaluate on', metavar='NAME')
    max_unreadable: int = option(
        100, 'number of unreadable training images that each rank may skip', type=non_negative_int, metavar='N')
    output: str = option('output', 'folder of all runs', metavar='DIR')
    experiment: Optional[str] = option(
        None, "name of the run's folder in --output; the same run in it is resumed (default: the model's name)",
        metavar='NAME')
    fit_img_size: bool = option(
        False, "take the image side from the training images: the median of their shorter sides, as a multiple of 32 "
        "from 64 to the model's own")
    balance_classes: bool = option(False, 'sample the images of each class equally often')
    epochs: int = option(300, 'number of epochs', type=positive_int, metavar='N')
    patience: Optional[int] = option(
        None, 'stop after N epochs without a better top-1', type=positive_int, metavar='N')
    pretrained: bool = option(False, "start from timm's pretrained weights")
    initial_checkpoint: Optional[str] = option(
        None, "start from the weights of a checkpoint: ours, timm's or the original release's", metavar='FILE')
    freeze: Optional[str] = option(
        None, "modules whose weights stay as they are, e.g. stem,stages.0; 'backbone' means all but the classifier",
        metavar='NAMES')
    grad_checkpointing: bool = option(False, 'recompute activations: less memory, more time')
    torchcompile: Optional[str] = option(
        None, 'torch.compile with this backend (inductor if none is named)', nargs='?', const='inductor',
        metavar='BACKEND')
    sync_bn: bool = option(False, 'synchronize batch norms over all ranks, on GPUs')
    bn_momentum: Optional[float] = option(
        None, "momentum of the batch norms' running statistics (default: the model's)", type=positive_unit_float,
        metavar='X')
    recalibrate_bn: Optional[int] = option(
        None, 'compute the running statistics of the batch norms from N training batches before each evaluation '
        '(default: from 256 images in runs of fewer than 2000 steps, if they lag, otherwise 0: never)',
        type=non_negative_int,
        metavar='N')
    global_batch_size: Optional[int] = option(
        None, 'images of a step over all ranks; gradients are accumulated to reach it', type=positive_int,
        metavar='N')
    grad_accum_steps: Optional[int] = option(
        None, 'number of batches accumulated in a step, instead of --global-batch-size', type=positive_int,
        metavar='N')


@dataclass(frozen=True)
class CheckpointOptions(CheckedOptions):
    """Options of checkpoints and resuming."""
    title: ClassVar[str] = 'checkpointing'

    recovery_interval: int = option(
        500, 'number of steps between checkpoints within an epoch', timm=0, type=positive_int, metavar='N')
    save_interval: Optional[int] = option(
        None, 'also keep the weights of each N-th epoch, as checkpoint-EPOCH.pth.tar', type=positive_int, metavar='N')
    save_top_k: Optional[int] = option(
        None, 'also keep the weights of the N best epochs, as best-EPOCH.pth.tar', type=positive_int, metavar='N')
    resume: Optional[str] = option(
        None, "resume from this checkpoint if the run's folder has none", metavar='FILE')
    force_resume: bool = option(False, 'resume although options changed that must not change')
    max_nonfinite_steps: int = option(
        10, 'number of consecutive steps with NaN or infinity that are skipped before the run stops',
        type=positive_int, metavar='N')


@dataclass(frozen=True)
class LoggingOptions(CheckedOptions):
    """Options of logging."""
    title: ClassVar[str] = 'logging'

    log_interval: int = option(50, 'number of steps between log lines', type=positive_int, metavar='N')
    log_tensorboard: bool = option(False, 'also log to TensorBoard')
    log_wandb: bool = option(False, 'also log to Weights & Biases')
    wandb_project: Optional[str] = option(None, 'project of Weights & Biases', metavar='NAME')


@dataclass(frozen=True)
class OptimizerOptions(CheckedOptions):
    """Options of the optimizer."""
    title: ClassVar[str] = 'optimizer'

    opt: str = option('adamw', "optimizer, by timm's name", timm='sgd', metavar='NAME')
    opt_eps: Optional[float] = option(None, "epsilon (default: the optimizer's)", type=moderate_float, metavar='X')
    opt_betas: Floats = option(
        None, "betas (default: the optimizer's)", type=unit_float, nargs='+', metavar='X')
    momentum: float = option(0.9, 'momentum', type=unit_float, metavar='X')
    weight_decay: float = option(0.05, 'weight decay', timm='2e-5', type=bounded_number(float, 0, 1e6), metavar='X')
    clip_grad: Optional[float] = option(
        None, 'largest norm of the gradient (default: no limit)', type=positive_float, metavar='X')
    layer_decay: Optional[float] = option(
        None, 'factor of the learning rate from layer to layer', type=positive_unit_float, metavar='X')
    lr: float = option(1e-3, 'learning rate', timm='from --lr-base', type=moderate_float, metavar='X')


@dataclass(frozen=True)
class ScheduleOptions(CheckedOptions):
    """Options of the learning rate schedule, which is stepped once per optimizer update."""
    title: ClassVar[str] = 'learning rate schedule'

    sched: str = option('cosine', 'schedule', choices=('cosine', 'poly', 'step', 'tanh'))
    decay_epochs: int = option(30, 'epochs between decays of --sched step', timm=90, type=positive_int, metavar='N')
    decay_rate: float = option(0.1, 'factor of --sched step, power of poly', type=unit_float, metavar='X')
    warmup_epochs: int = option(5, 'epochs of warm-up', type=non_negative_int, metavar='N')
    warmup_lr: float = option(
        1e-6, 'learning rate at the start of warm-up', timm='1e-5', type=non_negative_float, metavar='X')
    min_lr: float = option(1e-6, 'lowest learning rate', timm=0, type=non_negative_float, metavar='X')


@dataclass(frozen=True)
class AugmentationOptions(CheckedOptions):
    """Options of augmentation and regularization."""
    title: ClassVar[str] = 'augmentation and regularization'

    no_aug: bool = option(False, 'no augmentation')
    scale: List[float] = option(
        [0.08, 1.0], 'range of the cropped area', type=positive_unit_float, nargs=2, metavar='X')
    ratio: List[float] = option(
        [3 / 4, 4 / 3], 'range of the aspect ratio (default: 3/4 4/3)', type=positive_float, nargs=2, metavar='X')
    random_crop_pad: Optional[int] = option(
        None, 'instead of --scale and --ratio: pad images by N black pixels, and crop to their size (CIFAR)',
        type=non_negative_int, metavar='N')
    hflip: float = option(0.5, 'probability of a horizontal flip', type=unit_float, metavar='P')
    vflip: float = option(0., 'probability of a vertical flip', type=unit_float, metavar='P')
    color_jitter: float = option(0.4, 'strength of color jitter', type=non_negative_float, metavar='X')
    aa: Optional[str] = option(None, 'AutoAugment or RandAugment policy', metavar='NAME')
    reprob: float = option(0., 'probability of random erasing', type=unit_float, metavar='P')
    remode: str = option('pixel', 'mode of random erasing', choices=('const', 'rand', 'pixel'))
    recount: int = option(1, 'number of erased regions', type=positive_int, metavar='N')
    train_interpolation: Optional[str] = option(
        None, "interpolation of resizing in training (default: the model's; timm: random)",
        choices=(*INTERPOLATIONS, 'random'))
    mixup: float = option(0., 'alpha of Mixup, 0 for none', type=non_negative_float, metavar='ALPHA')
    cutmix: float = option(0., 'alpha of CutMix, 0 for none', type=non_negative_float, metavar='ALPHA')
    mixup_prob: float = option(1., 'probability of Mixup or CutMix', type=unit_float, metavar='P')
    mixup_switch_prob: float = option(
        0.5, 'probability of CutMix if both are on', type=unit_float, metavar='P')
    mixup_mode: str = option('batch', 'how Mixup and CutMix are applied', choices=('batch', 'pair', 'elem'))
    mixup_off_epoch: int = option(
        0, 'epoch from which Mixup and CutMix are off (default: %(default)s, never)', type=non_negative_int,
        metavar='N')
    smoothing: float = option(0.1, 'label smoothing', type=bounded_number(float, 0, 0.999), metavar='X')
    drop: Optional[float] = option(None, "dropout rate (default: the model's)", type=unit_float, metavar='P')
    drop_path: Optional[float] = option(
        None, "rate of stochastic depth (default: the model's)", type=unit_float, metavar='P')


@dataclass(frozen=True)
class EMAOptions(CheckedOptions):
    """Options of the exponential moving average (EMA) of the weights."""
    title: ClassVar[str] = 'model EMA'

    model_ema: bool = option(False, 'keep EMA weights, and evaluate them as well')
    model_ema_decay: float = option(0.9999, 'decay', timm=0.9998, type=unit_float, metavar='X')
    model_ema_warmup: Optional[bool] = option(
        None, 'let the decay rise to its value (default: in runs of fewer steps than 10 / (1 - decay); timm: no)',
        action=argparse.BooleanOptionalAction)


@dataclass(frozen=True)
class TrainOptions:
    """All options of a training run."""
    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    device: DeviceOptions = field(default_factory=DeviceOptions)
    run: RunOptions = field(default_factory=RunOptions)
    checkpointing: CheckpointOptions = field(default_factory=CheckpointOptions)
    logging: LoggingOptions = field(default_factory=LoggingOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    augmentation: AugmentationOptions = field(default_factory=AugmentationOptions)
    ema: EMAOptions = field(default_factory=EMAOptions)
    debugging: DebugOptions = field(default_factory=DebugOptions)

    @classmethod
    def groups(cls) -> Dict[str, Any]:
        """Return the dataclass of each group by its name."""
        hints = get_type_hints(cls)
        return {item.name: hints[item.name] for item in fields(cls)}

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> 'TrainOptions':
        """Return the options of a parsed command line."""
        return cls(**{name: read_options(args, group) for name, group in cls.groups().items()})

    def as_dict(self) -> Dict[str, Any]:
        """Return all options by name, as checkpoints store them and ``--config`` reads them."""
        values = {key: value for group in asdict(self).values() for key, value in group.items()}
        return {key: value for key, value in values.items() if key not in ('resume', 'force_resume')}

    def with_values(self, group: str, **values: Any) -> 'TrainOptions':
        """Return a copy in which some options of a group are replaced."""
        return replace(self, **{group: replace(getattr(self, group), **values)})


# Options of training, what they need to have an effect, and whether that is there.
_PRECONDITIONS: Tuple[Tuple[Tuple[str, ...], str, Callable[[argparse.Namespace], Any]], ...] = (
    (('amp_dtype',), 'without --amp', lambda args: args.amp),
    (('decay_epochs',), 'without --sched step', lambda args: args.sched == 'step'),
    (('decay_rate',), 'without --sched step or poly', lambda args: args.sched in ('step', 'poly')),
    (('warmup_lr',), 'without --warmup-epochs', lambda args: args.warmup_epochs),
    (('mixup_prob', 'mixup_mode', 'mixup_off_epoch'), 'without --mixup or --cutmix',
     lambda args: args.mixup or args.cutmix),
    (('mixup_switch_prob',), 'without --mixup and --cutmix', lambda args: args.mixup and args.cutmix),
    (('remode', 'recount'), 'without --reprob', lambda args: args.reprob),
    (('model_ema_decay', 'model_ema_warmup'), 'without --model-ema', lambda args: args.model_ema),
    (('wandb_project',), 'without --log-wandb', lambda args: args.log_wandb),
    (('scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'aa', 'reprob', 'random_crop_pad'), 'with --no-aug',
     lambda args: not args.no_aug),
    (('scale', 'ratio', 'train_interpolation'), 'with --random-crop-pad', lambda args: args.random_crop_pad is None),
    (('scale', 'ratio', 'vflip', 'color_jitter', 'remode', 'recount', 'no_aug'), 'on sequences',
     lambda args: not is_sequence_dataset(args.dataset)),
    (('hflip',), 'on sequences without --random-crop-pad',
     lambda args: not is_sequence_dataset(args.dataset) or args.random_crop_pad is not None),
    (('color_jitter',), 'with --aa, except for 3a', lambda args: not args.aa or '3a' in args.aa),
)


def is_sequence_dataset(dataset: Optional[str]) -> bool:
    """Return whether a data set's name stands for sequences, ``seq/NAME``."""
    return (dataset or '').lower().startswith('seq/')


def ineffective_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> List[str]:
    """Return a line for each option of the command line that has no effect beside the other options.

    Values of a ``--config`` file are the parser's defaults, and not reported: a recipe stays complete if a part of it
    is switched off.
    """
    return [
        f'--{name.replace("_", "-")} has no effect {reason}'
        for names, reason, has_effect in _PRECONDITIONS for name in names
        if name in args and getattr(args, name) != parser.get_default(name) and not has_effect(args)
    ]
