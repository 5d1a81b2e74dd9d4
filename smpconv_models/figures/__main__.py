"""Pictures of what is inside a network.

    python -m smpconv_models.figures kernels         --checkpoint output/digits --output kernels.png
    python -m smpconv_models.figures stages          --checkpoint output/digits --untrained --output stages.png
    python -m smpconv_models.figures receptive-field --checkpoint SMPConv_T.pth --images IMAGES --output field.png
    python -m smpconv_models.figures heat-map        --model smpconv_t --pretrained --images cat.jpg --output cat.png
    python -m smpconv_models.figures animation       --checkpoint output/digits --output points.gif

Checkpoints are files of train.py, of timm's script or of the original release, or the folder of a run, which stands for
its best checkpoint (in animation: for its checkpoint-EPOCH.pth.tar, which train.py --snapshot-interval keeps). The
averaged weights are taken where there are any, unless --no-use-ema. --model is a name of timm's or of this package, or
hf-hub:OWNER/NAME, local-dir:FOLDER.

Exit codes: 0 done, 2 wrong arguments, files or images (no picture is written), 130 interrupted.
"""
import argparse
import logging
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
import torch
from tqdm import tqdm

import smpconv_models  # noqa: F401 (registers the models with timm)
from smpconv_models import figures
from smpconv_models.training import cli, config
from smpconv_models.utils import streams
from smpconv_models.utils.atomic_io import atomic_write
from smpconv_models.utils.errors import first_line

from . import _inputs, animation, grad_cam
from .receptive_field import SHARES


def create_parser() -> argparse.ArgumentParser:
    parser = config.Parser(
        prog='python -m smpconv_models.figures', description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    command = _add(
        commands, 'kernels', "of layers or filters, a row each: the points with their reaches, then channels' kernels")
    _add_layers(command)

    command = _add(
        commands, 'stages', 'the absolute kernels of each stage, or block of a network for sequences, summed',
        several=True)
    _add_untrained(command)

    command = _add(
        commands, 'receptive-field', 'how much each pixel contributes to the middle of the last feature map',
        several=True)
    _add_untrained(command)
    _add_images(command, 50)

    command = _add(commands, 'heat-map', 'where the features speak for a class (grad-cam package)')
    _add_images(command, 8)
    command.add_argument('--layer', metavar='NAME', help="module whose features to take, else the last stage's")
    command.add_argument('--class', dest='index', type=cli.whole, metavar='N', help='its index, else the predicted')
    command.add_argument('--method', choices=grad_cam.METHODS, default='GradCAM', help='(default: %(default)s)')

    command = _add(commands, 'animation', "layers' points and kernels over several checkpoints", several=True)
    _add_layers(command, 3)
    command.add_argument(
        '--fps', type=cli.number(float, 0.1, 50), default=5., metavar='X',
        help='frames in a second (default: %(default)g)')
    return parser


def _add(commands: Any, name: str, what: str, several: bool = False) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=what, description=f'{what[0].upper()}{what[1:]}.', allow_abbrev=False)
    suffixes = _suffixes(name)
    command.add_argument(
        '--output', required=True, metavar=f'FILE{suffixes[0]}', help=f'ends in {" or ".join(suffixes)}')
    group: Any = {'nargs': '+', 'help': 'one or more'} if several else {'nargs': 1, 'help': 'a single one'}
    command.add_argument('--checkpoint', metavar='PATH', **group)
    command.add_argument(
        '--use-ema', action=argparse.BooleanOptionalAction, default=True, help='prefer the averaged weights')
    command.add_argument('--pretrained', action='store_true', help='with --model: its pretrained weights')
    command.add_argument('--reparam', action='store_true', help='re-parameterize first')
    command.add_argument(
        '--seed', type=cli.number(int, 0, 2 ** 32 - 1), metavar='N',
        help="of a network without weights (default: that of the checkpoint's run, else 42)")
    cli.add_model_options(command)
    return command


def _add_layers(command: argparse.ArgumentParser, most: int = 6) -> None:
    command.add_argument(
        '--layer', nargs='+', metavar='NAME', help='those to show, else --max-layers over the whole depth')
    command.add_argument('--max-layers', type=cli.count, default=most, metavar='N', help='(default: %(default)s)')
    command.add_argument(
        '--columns', type=cli.count, default=6, metavar='N', help='kernels of each (default: %(default)s)')
    command.add_argument(
        '--filter', type=cli.whole, default=0, metavar='N',
        help='its number, in networks whose filters have points of their own (default: %(default)s)')


def _add_untrained(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        '--untrained', action='store_true', help="beside them, the first checkpoint's network with random weights")


def _add_images(command: argparse.ArgumentParser, most: int) -> None:
    command.add_argument(
        '--images', nargs='+', metavar='PATH',
        help="files, folders, or 'digits' (embedded), as is the default for a network trained on them")
    command.add_argument(
        '--num-images', type=cli.count, default=most, metavar='N', help='at most (default: %(default)s)')
    command.add_argument('--img-size', type=cli.count, metavar='N', help="side in pixels, else the network's")


def _suffixes(command: str) -> List[str]:
    return list(animation.FORMATS) if command == 'animation' else ['.png']


def check_output(args: argparse.Namespace) -> Path:
    """The file to write.

    Raises:
        ValueError: It can't be written, or isn't named for a picture.
    """
    path = Path(args.output).resolve()
    if path.suffix.lower() not in _suffixes(args.command):
        raise ValueError(f'--output takes the name of a {" or ".join(_suffixes(args.command))} file, got {args.output}')
    if path.exists() and not path.is_file():
        raise ValueError(f'--output {args.output} is not a file')
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise ValueError(f'--output {args.output} cannot be written: {error.strerror}') from error


def draw_kernels(args: argparse.Namespace, path: Path) -> None:
    network, = _inputs.networks(args)
    figures.save_kernels(path, network.model, args.layer, args.max_layers, args.columns, args.filter)


def draw_stages(args: argparse.Namespace, path: Path) -> None:
    figures.save_stages(path, {network.label: network.model for network in _inputs.networks(args)})


def draw_receptive_fields(args: argparse.Namespace, path: Path) -> None:
    fields: Dict[str, np.ndarray] = {}
    for network in _inputs.networks(args):
        images = _inputs.images(args, network)
        if network.is_random:
            _inputs.settle_norms(network.model, images.inputs)
        try:
            fields[network.label] = figures.effective_receptive_field(network.model, images.inputs)
        except ValueError as error:
            raise ValueError(f'{network.label}: {error}') from error
    figures.save_receptive_fields(path, fields)
    print('share of the area in the smallest central square that holds a share of the contributions')
    width = max(map(len, fields))
    print(' ' * width, 'of', ' ' * 12, *(f'{100 * share:6.0f} %' for share in SHARES))
    for label, field in fields.items():
        for of_what, values in (('the gradient', field), ('log10(1 + it)', figures.log_scaled(field))):
            areas = [figures.central_square(values, share).area for share in SHARES]
            print(f'{label:{width}} {of_what:15}', *(f'{100 * area:6.1f} %' for area in areas))


def draw_heat_maps(args: argparse.Namespace, path: Path) -> None:
    network, = _inputs.networks(args)
    images = _inputs.images(args, network)
    classes = None if args.index is None else [args.index] * len(images.inputs)
    shares = grad_cam.predict(network.model, images.inputs).softmax(1)
    maps = figures.heat_maps(network.model, images.inputs, args.layer, classes, args.method)
    shown = shares.argmax(1).tolist() if classes is None else classes
    titles = [
        f'{_shortened(name)}: {_class_name(network, index)} ({100 * share[index]:.0f} %)'
        for name, index, share in zip(images.names, shown, shares.tolist())]
    figures.save_heat_maps(path, images.pixels, maps, titles)


def _class_name(network: _inputs.Network, index: int) -> str:
    return _shortened(network.classes[index]) if network.classes else f'class {index}'


def _shortened(name: str) -> str:
    return name if len(name) <= 24 else f'{name[:23]}…'


def draw_animation(args: argparse.Namespace, path: Path) -> None:
    if args.checkpoint is None:
        raise ValueError('expected --checkpoint: two or more, or the folder of a run')
    if args.pretrained:
        raise ValueError('--pretrained and --checkpoint both say which weights')
    snapshots = []
    files = _inputs.snapshots_of(args.checkpoint)
    if len({Path(file).resolve() for file in files}) < len(files):
        raise ValueError(f'expected different checkpoints, got one of them twice: {" ".join(files)}')
    for file in tqdm(files, desc='reading', unit='checkpoint', leave=False, disable=None):
        network = _inputs.from_file(args, file)
        snapshots.append((network.label, figures.choose_layers(network.model, args.layer, args.max_layers)))
    format = animation.FORMATS[Path(args.output).suffix.lower()]
    figures.save_animation(path, snapshots, args.columns, args.fps, format, args.filter)


DRAW = {
    'kernels': draw_kernels,
    'stages': draw_stages,
    'receptive-field': draw_receptive_fields,
    'heat-map': draw_heat_maps,
    'animation': draw_animation,
}


def main(argv: Optional[List[str]] = None) -> int:
    logging.basicConfig(level=logging.WARNING, format='%(message)s')
    parser = create_parser()
    args = parser.parse_args(argv)
    try:
        with atomic_write(check_output(args)) as temporary:
            DRAW[args.command](args, temporary)
    except (torch.OutOfMemoryError, MemoryError) as error:
        parser.error(f'out of memory: {first_line(error)}; a smaller --img-size needs less')
    except (ImportError, OSError, ValueError) as error:
        parser.error(first_line(error))
    except KeyboardInterrupt:
        parser.exit(130, f'{parser.prog}: interrupted\n')
    print(f'picture: {args.output}')
    return 0


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    streams.keep_writable()
    sys.exit(main())
