"""The command-line options of train.py and validate.py, by timm's names."""
import argparse
import ast
import logging
import math
import os
from typing import Any, Callable, List, Optional, Tuple

from smpconv_models.checkpoint.description import INTERPOLATIONS

from . import task_sequence

TINIEST = 1e-30  # instead of an open interval at 0


def number(kind: Callable[[str], Any], low: float, high: float = math.inf) -> Callable[[str], Any]:
    """A converter for argparse: a finite number of this kind in [low, high]."""
    least = 'above 0' if low == TINIEST else f'at least {low:g}'
    expected = least if high == math.inf else f'{least} and at most {high:g}'

    def convert(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high or abs(value) == math.inf:
            raise argparse.ArgumentTypeError(f'must be {expected}, got {text}')
        return value

    convert.__name__ = 'whole number' if kind is int else 'number'  # argparse names it where the text is neither
    return convert


class Keywords(argparse.Action):
    """Parse ``KEY=VALUE`` pairs as timm's ``ParseKwargs`` does; a malformed pair or open bracket is a usage error."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Optional[str] = None) -> None:
        keywords = {}
        for pair in values:
            key, equals, value = pair.partition('=')
            if not equals:
                raise argparse.ArgumentError(self, f'expected KEY=VALUE, got {pair}')
            try:
                keywords[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                if value.startswith(('(', '[', '{')):
                    raise argparse.ArgumentError(self, f'expected a value of Python, got {pair}') from None
                keywords[key] = value
        setattr(namespace, self.dest, keywords)


count = number(int, 1, 10 ** 9)
whole = number(int, 0, 10 ** 9)
positive = number(float, TINIEST)
moderate = number(float, TINIEST, 1e6)  # optimizers multiply and divide them, in float32
non_negative = number(float, 0)
fraction = number(float, 0, 1)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Where the images come from and how they are read."""
    group = parser.add_argument_group('data')
    group.add_argument('--data-dir', metavar='DIR', help='folder of the data set')
    group.add_argument(
        '--dataset', metavar='NAME',
        help="'digits' (embedded), torch/NAME, wds/NAME, hfds/NAME, tfds/NAME; seq/NAME for sequences, embedded "
             'seq/digits and seq/permuted-digits; without it --data-dir has a folder for each split with a folder for '
             'each class')
    group.add_argument('--dataset-download', action='store_true', help='let torchvision or the hub download it')
    group.add_argument(
        '-b', '--batch-size', type=count, default=128, metavar='N', help='(default: %(default)s)')
    group.add_argument(
        '-vb', '--validation-batch-size', type=count, metavar='N', help='batch size of evaluation, if another')
    group.add_argument(
        '-j', '--workers', type=whole, default=min(4, os.cpu_count() or 1), metavar='N',
        help='processes that load (default: %(default)s, 4 or the number of cores)')
    group.add_argument('--pin-mem', action='store_true', help='pin memory in the loader')
    group.add_argument('--no-prefetcher', action='store_true', help="do without timm's prefetcher on a GPU")
    group.add_argument(
        '--skip-unreadable', action='store_true', help='leave unreadable images out of evaluation too, not an error')
    group.add_argument(
        '--exif-orientation', action=argparse.BooleanOptionalAction,
        help='turn images as their EXIF orientation asks (default: no in training; in evaluation as in training)')
    group.add_argument('--img-size', type=count, metavar='N', help="image side in pixels, else the model's")
    group.add_argument('--input-size', type=count, nargs=3, metavar=('C', 'H', 'W'), help='instead of --img-size')
    group.add_argument('--crop-pct', type=positive, metavar='X', help='part of the resized image kept in evaluation')
    group.add_argument(
        '--mean', type=number(float, -math.inf), nargs='+', metavar='X',
        help="of the channels, else the model's")
    group.add_argument('--std', type=positive, nargs='+', metavar='X', help="of the channels, else the model's")
    group.add_argument('--interpolation', choices=INTERPOLATIONS, help="of resizing, else the model's")
    group.add_argument(
        '--seed', type=number(int, 0, 2 ** 32 - 1), default=42, metavar='N', help='(default: %(default)s)')


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model."""
    group = parser.add_argument_group('model')
    group.add_argument(
        '--model', metavar='NAME', help="of this package or of timm's, or hf-hub:OWNER/NAME, local-dir:FOLDER")
    group.add_argument('--num-classes', type=count, metavar='N', help="else the data set's, else the model's")
    group.add_argument('--in-chans', type=count, metavar='N', help='1 reads gray images')
    group.add_argument(
        '--model-kwargs', nargs='*', default={}, action=Keywords, metavar='KEY=VALUE',
        help="more arguments of the model's constructor")


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Where and in which precision and layout to run."""
    group = parser.add_argument_group('device')
    group.add_argument('--device', metavar='NAME', help='cuda if there is one, else cpu')
    group.add_argument(
        '--dist-timeout', type=number(float, TINIEST, 1e6), default=600., metavar='S',
        help='seconds to wait for another process, one that loads images too (default: %(default)g)')
    group.add_argument('--amp', action='store_true', help='automatic mixed precision')
    group.add_argument(
        '--amp-dtype', choices=('float16', 'bfloat16'), default='float16', help='(default: %(default)s)')
    group.add_argument('--channels-last', action='store_true', help='channels_last layout')


def add_debug_option(parser: argparse.ArgumentParser) -> None:
    """How much is told of an error."""
    parser.add_argument('--debug', action='store_true', help='show where an error came from, not its line alone')


def show_causes(args: argparse.Namespace) -> None:
    """Has the package log the traceback of an error that is told in one line, if ``--debug`` asks for it."""
    if args.debug:
        logging.getLogger('smpconv_models').setLevel(logging.DEBUG)


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """The recipe, and where its results go."""
    group = parser.add_argument_group('run')
    group.add_argument('--train-split', default='train', metavar='NAME', help='(default: %(default)s)')
    group.add_argument('--val-split', default='validation', metavar='NAME', help='(default: %(default)s)')
    group.add_argument(
        '--max-unreadable', type=whole, default=100, metavar='N',
        help='training images of a process that may be unreadable, and are left out (default: %(default)s)')
    group.add_argument('--output', default='output', metavar='DIR', help='(default: %(default)s)')
    group.add_argument(
        '--experiment', metavar='NAME',
        help="folder in --output; a run that is there goes on, if it is this one (default: the model's name)")
    group.add_argument('--epochs', type=count, default=300, metavar='N', help='(default: %(default)s)')
    group.add_argument('--pretrained', action='store_true', help="start from timm's pretrained weights")
    group.add_argument(
        '--initial-checkpoint', metavar='FILE', help="start from these weights: ours, timm's or the original release's")
    group.add_argument('--grad-checkpointing', action='store_true', help='less memory, more time')
    group.add_argument(
        '--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='torch.compile (inductor if not named)')
    group.add_argument(
        '--sync-bn', action='store_true', help="batch norms over all processes' images; on GPUs")
    group.add_argument(
        '--global-batch-size', type=count, metavar='N',
        help='images of a step over all processes; as many batches are accumulated as it takes')
    group.add_argument(
        '--grad-accum-steps', type=count, metavar='N', help='batches of a step, instead of --global-batch-size')

    group = parser.add_argument_group('going on')
    group.add_argument(
        '--recovery-interval', type=count, default=500, metavar='N',
        help='steps between checkpoints, which epochs have anyway (default: %(default)s)')
    group.add_argument(
        '--snapshot-interval', type=count, metavar='N',
        help='also keep the weights of each N-th epoch, as checkpoint-EPOCH.pth.tar (default: none)')
    group.add_argument(
        '--resume', metavar='FILE', help="go on from this checkpoint while the run's folder has none of its own")
    group.add_argument(
        '--force-resume', action='store_true', help='go on although what should not have changed has')
    group.add_argument(
        '--patience-nonfinite', type=count, default=10, metavar='N',
        help='steps in a row that may come to NaN or infinity, and are not applied (default: %(default)s)')

    group = parser.add_argument_group('telling')
    group.add_argument(
        '--log-interval', type=count, default=50, metavar='N', help='steps between lines (default: %(default)s)')
    group.add_argument('--log-tensorboard', action='store_true', help="write TensorBoard's files too")
    group.add_argument('--log-wandb', action='store_true', help='tell Weights & Biases too')
    group.add_argument('--wandb-project', metavar='NAME', help='(default: its own)')

    group = parser.add_argument_group('optimizer')
    group.add_argument('--opt', default='adamw', metavar='NAME', help='(default: %(default)s)')
    group.add_argument('--opt-eps', type=moderate, metavar='X')
    group.add_argument('--opt-betas', type=fraction, nargs='+', metavar='X')
    group.add_argument('--momentum', type=fraction, default=0.9, metavar='X', help='(default: %(default)s)')
    group.add_argument(
        '--weight-decay', type=number(float, 0, 1e6), default=0.05, metavar='X', help='(default: %(default)s)')
    group.add_argument('--clip-grad', type=positive, metavar='X', help='largest norm of the gradient')
    group.add_argument(
        '--layer-decay', type=number(float, TINIEST, 1), metavar='X',
        help='factor of the rate from layer to layer')
    group.add_argument('--lr', type=moderate, default=1e-3, metavar='X', help='(default: %(default)s)')
    group.add_argument(
        '--sched', choices=('cosine', 'poly', 'step', 'tanh'), default='cosine',
        help='of the rate, for each step (default: %(default)s)')
    group.add_argument(
        '--decay-epochs', type=count, default=30, metavar='N', help='of --sched step (default: %(default)s)')
    group.add_argument(
        '--decay-rate', type=fraction, default=0.1, metavar='X', help='of --sched step, poly (default: %(default)s)')
    group.add_argument('--warmup-epochs', type=whole, default=5, metavar='N', help='(default: %(default)s)')
    group.add_argument('--warmup-lr', type=non_negative, default=1e-6, metavar='X', help='(default: %(default)s)')
    group.add_argument('--min-lr', type=non_negative, default=1e-6, metavar='X', help='(default: %(default)s)')

    group = parser.add_argument_group('augmentation and regularization')
    group.add_argument('--no-aug', action='store_true', help='no augmentation')
    group.add_argument(
        '--scale', type=number(float, TINIEST, 1), nargs=2, default=[0.08, 1.0], metavar='X',
        help='area kept (default: %(default)s)')
    group.add_argument(
        '--ratio', type=positive, nargs=2, default=[3 / 4, 4 / 3], metavar='X', help='aspect (default: 3/4 4/3)')
    group.add_argument(
        '--crop-padding', type=whole, metavar='N',
        help='instead of --scale and --ratio: N black pixels around the image, and a crop of its size (CIFAR)')
    group.add_argument('--hflip', type=fraction, default=0.5, metavar='P', help='(default: %(default)s)')
    group.add_argument('--vflip', type=fraction, default=0., metavar='P', help='(default: %(default)s)')
    group.add_argument('--color-jitter', type=non_negative, default=0.4, metavar='X', help='(default: %(default)s)')
    group.add_argument('--aa', metavar='NAME', help='AutoAugment or RandAugment policy')
    group.add_argument('--reprob', type=fraction, default=0., metavar='P', help='random erasing (default: %(default)s)')
    group.add_argument('--remode', default='pixel', choices=('const', 'rand', 'pixel'), help='(default: %(default)s)')
    group.add_argument('--recount', type=count, default=1, metavar='N', help='(default: %(default)s)')
    group.add_argument(
        '--train-interpolation', choices=(*INTERPOLATIONS, 'random'),
        help="of training, else the model's")
    group.add_argument('--mixup', type=non_negative, default=0., metavar='ALPHA', help='(default: %(default)s)')
    group.add_argument('--cutmix', type=non_negative, default=0., metavar='ALPHA', help='(default: %(default)s)')
    group.add_argument('--mixup-prob', type=fraction, default=1., metavar='P', help='(default: %(default)s)')
    group.add_argument('--mixup-switch-prob', type=fraction, default=0.5, metavar='P', help='(default: %(default)s)')
    group.add_argument('--mixup-mode', choices=('batch', 'pair', 'elem'), default='batch', help='(default: batch)')
    group.add_argument('--mixup-off-epoch', type=whole, default=0, metavar='N', help='no mixing from here; 0: never')
    group.add_argument(
        '--smoothing', type=number(float, 0, 0.999), default=0.1, metavar='X',
        help='of labels (default: %(default)s)')
    group.add_argument('--drop', type=fraction, metavar='P', help="dropout, else the model's")
    group.add_argument('--drop-path', type=fraction, metavar='P', help="stochastic depth, else the model's")

    group = parser.add_argument_group('averaging')
    group.add_argument('--model-ema', action='store_true', help='average the weights')
    group.add_argument('--model-ema-decay', type=fraction, default=0.9999, metavar='X', help='(default: %(default)s)')
    group.add_argument('--model-ema-warmup', action='store_true', help='let the decay rise to it')


# Options of training, what they need to have an effect, and whether that is there.
_NEEDS: Tuple[Tuple[Tuple[str, ...], str, Callable[[argparse.Namespace], Any]], ...] = (
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
    (('scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'aa', 'reprob', 'crop_padding'), 'with --no-aug',
     lambda args: not args.no_aug),
    (('scale', 'ratio', 'train_interpolation'), 'with --crop-padding', lambda args: args.crop_padding is None),
    (('scale', 'ratio', 'vflip', 'color_jitter', 'remode', 'recount'), 'on sequences',
     lambda args: not task_sequence.are_meant(args)),
    (('no_aug',), 'on sequences', lambda args: not task_sequence.are_meant(args)),
    (('hflip',), 'on sequences without --crop-padding',
     lambda args: not task_sequence.are_meant(args) or args.crop_padding is not None),
    (('color_jitter',), 'with --aa, except for 3a', lambda args: not args.aa or '3a' in args.aa),
)


def without_effect(parser: argparse.ArgumentParser, args: argparse.Namespace) -> List[str]:
    """A line for each option of the command line that others leave without effect.

    Those of a ``--config`` are the parser's defaults: a recipe stays whole where a part of it is switched off.
    """
    return [
        f'--{name.replace("_", "-")} has no effect {reason}'
        for names, reason, has_effect in _NEEDS for name in names
        if name in args and getattr(args, name) != parser.get_default(name) and not has_effect(args)
    ]
