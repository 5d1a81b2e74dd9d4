"""Draw plots of the inside of a network.

    python -m smpconv_models.figures kernels         --checkpoint output/digits --output kernels.png
    python -m smpconv_models.figures stages          --checkpoint output/digits --untrained --output stages.png
    python -m smpconv_models.figures receptive-field --checkpoint SMPConv_T.pth --images IMAGES --output field.png
    python -m smpconv_models.figures heat-map        --model smpconv_t --pretrained --images cat.jpg --output cat.png
    python -m smpconv_models.figures animation       --checkpoint output/digits --output points.gif

A checkpoint is a file of train.py, of timm's script or of the original release. The folder of a run stands for its best
checkpoint; for animation it stands for its checkpoint-EPOCH.pth.tar files, which train.py --save-interval writes. Of
the model's weights and the EMA weights, those are used that the checkpoint names as better, otherwise EMA. --model
takes a name of timm or of this package, hf-hub:OWNER/NAME or local-dir:FOLDER.

Exit codes: 0 success, 2 wrong arguments, files or images (no picture is written), 130 interrupted.
"""
import argparse
import inspect
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import numpy as np
import torch
from tqdm import tqdm

import smpconv_models  # noqa: F401 (registers the models with timm)
from smpconv_models import figures
from smpconv_models.prediction.inputs import ModelSource, find_images
from smpconv_models.training import ModelOptions, cli
from smpconv_models.training.batch_norm import recalibrate_bn_
from smpconv_models.utils import streams
from smpconv_models.utils.atomic_io import atomic_write, check_writable
from smpconv_models.utils.errors import error_prefix, first_line

from . import _inputs, grad_cam, training
from .receptive_field import SHARES


def create_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog='python -m smpconv_models.figures', description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    command = _add(
        commands, 'kernels', draw_kernels, 'plot points with their supports and kernels, one row per layer or filter')
    _add_layer_options(command)
    _add(
        commands, 'stages', draw_stages,
        'plot the summed absolute kernels of each stage, or block of a sequence network', several=True)
    command = _add(
        commands, 'receptive-field', draw_receptive_fields,
        'plot how much each pixel contributes to the middle of the last feature map', several=True)
    _add_image_options(command, 50)
    command = _add(
        commands, 'heat-map', draw_heat_maps, 'plot the regions that support a class (needs the grad-cam package)')
    _add_image_options(command, 8)
    command.add_argument('--layer', metavar='NAME', help='module whose feature maps to use (default: the last stage)')
    command.add_argument(
        '--class', dest='index', type=cli.non_negative_int, metavar='N',
        help='index of the class (default: the predicted class)')
    command.add_argument(
        '--method', choices=grad_cam.METHODS, default='GradCAM', help='Grad-CAM variant (default: %(default)s)')
    command = _add(
        commands, 'animation', draw_animation,
        "animate layers' points and kernels over several checkpoints", several=True)
    _add_layer_options(command, 3)
    command.add_argument(
        '--fps', type=cli.bounded_number(float, 0.1, 50), default=5., metavar='X',
        help='frames per second (default: %(default)g)')
    return parser


def _add(
        commands: Any, name: str, draw: Callable[..., None], purpose: str,
        several: bool = False) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name, help=purpose, description=f'{purpose[0].upper()}{purpose[1:]}.', allow_abbrev=False)
    command.set_defaults(draw=draw)
    extensions = _extensions(name)
    command.add_argument(
        '--output', required=True, metavar=f'FILE{extensions[0]}', help=f'file to write, {" or ".join(extensions)}')
    nargs: Any = '+' if several else 1
    command.add_argument(
        '--checkpoint', metavar='PATH', nargs=nargs,
        help='checkpoint files or run folders' if several else 'checkpoint file or run folder')
    cli.add_use_ema(command)
    command.add_argument('--pretrained', action='store_true', help='load the pretrained weights of --model')
    command.add_argument('--reparam', action='store_true', help='re-parameterize the network first')
    command.add_argument(
        '--seed', type=cli.bounded_number(int, 0, 2 ** 32 - 1), metavar='N',
        help="seed of random weights (default: the seed of the checkpoint's run, otherwise 42)")
    if name in ('stages', 'receptive-field'):
        command.add_argument('--untrained', action='store_true', help='also plot the first network with random weights')
    cli.add_options(command, ModelOptions)
    return command


def _add_layer_options(command: argparse.ArgumentParser, max_layers: int = 6) -> None:
    command.add_argument(
        '--layer', nargs='+', metavar='NAME', help='layers to show (default: --max-layers over the whole depth)')
    command.add_argument(
        '--max-layers', type=cli.positive_int, default=max_layers, metavar='N',
        help='maximum number of layers without --layer (default: %(default)s)')
    command.add_argument(
        '--columns', type=cli.positive_int, default=6, metavar='N',
        help='number of kernels per layer (default: %(default)s)')
    command.add_argument(
        '--filter', type=cli.non_negative_int, default=0, metavar='N',
        help='index of the filter, for networks with points per filter (default: %(default)s)')


def _add_image_options(command: argparse.ArgumentParser, num_images: int) -> None:
    command.add_argument(
        '--images', nargs='+', metavar='PATH',
        help="image files or folders, or 'digits' (embedded), which is the default for a network trained on them")
    command.add_argument(
        '--num-images', type=cli.positive_int, default=num_images, metavar='N',
        help='maximum number of images (default: %(default)s)')
    command.add_argument(
        '--img-size', type=cli.positive_int, metavar='N', help="side of the images in pixels (default: the model's)")


def _extensions(command: str) -> List[str]:
    return list(training.ANIMATION_FORMATS) if command == 'animation' else ['.png']


def draw_kernels(
        path: Path, source: ModelSource, layer: Optional[List[str]], max_layers: int, columns: int,
        filter: int) -> None:
    loaded, = source.load()
    figures.save_kernels(path, loaded.model, layer, max_layers, columns, filter)


def draw_stages(path: Path, source: ModelSource) -> None:
    figures.save_stages(path, {loaded.label: loaded.model for loaded in source.load()})


def draw_receptive_fields(path: Path, source: ModelSource, images: Optional[List[str]], num_images: int) -> None:
    fields: Dict[str, np.ndarray] = {}
    for loaded in source.load():
        batch = _inputs.load_images(loaded, images, num_images, source.img_size)
        if loaded.is_random:
            # with the initial statistics the maps of large kernels vanish beside the shortcuts, unlike in training
            recalibrate_bn_([loaded.model], [batch.inputs])
        with error_prefix(loaded.label):
            fields[loaded.label] = figures.effective_receptive_field(loaded.model, batch.inputs)
    figures.save_receptive_fields(path, fields)
    print('share of the area in the smallest central square that holds a share of the contributions')
    width = max(map(len, fields))
    print(' ' * width, 'of', ' ' * 12, *(f'{100 * share:6.0f} %' for share in SHARES))
    for label, field in fields.items():
        for measure, values in (('the gradient', field), ('log10(1 + it)', figures.log_scaled(field))):
            areas = [figures.central_square(values, share).area for share in SHARES]
            print(f'{label:{width}} {measure:15}', *(f'{100 * area:6.1f} %' for area in areas))


def draw_heat_maps(
        path: Path, source: ModelSource, images: Optional[List[str]], num_images: int, layer: Optional[str],
        index: Optional[int], method: str) -> None:
    loaded, = source.load()
    batch = _inputs.load_images(loaded, images, num_images, source.img_size)
    classes = None if index is None else [index] * len(batch.inputs)
    probabilities = grad_cam.predict(loaded.model, batch.inputs).softmax(1)
    maps = figures.heat_maps(loaded.model, batch.inputs, layer, classes, method)
    names = loaded.description.classes
    titles = []
    for image, label, row in zip(batch.names, classes or probabilities.argmax(1).tolist(), probabilities.tolist()):
        name = _shorten(names[label]) if names else f'class {label}'
        titles.append(f'{_shorten(image)}: {name} ({100 * row[label]:.0f} %)')
    figures.save_heat_maps(path, batch.pixels, maps, titles)


def _shorten(name: str) -> str:
    return name if len(name) <= 24 else f'{name[:23]}…'


def draw_animation(
        path: Path, source: ModelSource, layer: Optional[List[str]], max_layers: int, columns: int, filter: int,
        fps: float, output: str) -> None:
    if source.checkpoints is None:
        raise ValueError('expected --checkpoint: two or more, or the folder of a run')
    if source.pretrained:
        raise ValueError('--pretrained and --checkpoint both select weights: give one of them')
    snapshots = []
    files = _inputs.list_snapshots(source.checkpoints)
    if len({Path(file).resolve() for file in files}) < len(files):
        raise ValueError(f'expected different checkpoints, got one of them twice: {" ".join(files)}')
    for file in tqdm(files, desc='reading', unit='checkpoint', leave=False, disable=None):
        loaded = source.load_file(file)
        snapshots.append((loaded.label, figures.choose_layers(loaded.model, layer, max_layers)))
    kind = training.ANIMATION_FORMATS[Path(output).suffix.lower()]
    figures.save_animation(path, snapshots, columns, fps, kind, filter)


def check_no_input(output: str, images: List[str]) -> None:
    """Raise ValueError if a figure would replace one of the images that it shows."""
    paths = [name for name in images if os.path.exists(name)]       # other names are 'digits', or refused later
    if Path(output).resolve() in {path.resolve() for path in find_images(paths, '--images')}:
        raise ValueError(f'--output {output} is one of --images: name another file')


def main(argv: Optional[List[str]] = None) -> int:
    logging.basicConfig(level=logging.WARNING, format='%(message)s')
    parser = create_parser()
    args = parser.parse_args(argv)
    source = ModelSource(
        cli.read_options(args, ModelOptions), args.checkpoint, args.pretrained, getattr(args, 'untrained', False),
        args.use_ema, args.reparam, args.seed, getattr(args, 'img_size', None))
    own = {name: value for name, value in vars(args).items() if name in inspect.signature(args.draw).parameters}
    try:
        check_no_input(args.output, own.get('images') or [])
        with atomic_write(check_writable(args.output, '--output', _extensions(args.command))) as temporary:
            args.draw(temporary, source, **own)
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
