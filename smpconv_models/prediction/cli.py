"""Predict the classes of images.

    python -m smpconv_models.predict cat.jpg --checkpoint output/cats                 the best checkpoint of a run
    python -m smpconv_models.predict PHOTOS more.png --checkpoint RUN --output results.csv
    python -m smpconv_models.predict PHOTOS --checkpoint FOLDER --topk 1 --features features.npy --heat-map HEAT
    curl -s URL | python -m smpconv_models.predict - --checkpoint hf-hub:OWNER/NAME   an image on standard input

A checkpoint is a file of train.py, of timm's script or of the original release, the folder of a run, a folder of
hub/convert.py, or a repository of the Hub. Images are prepared as in the evaluation during training. In folders, images
are found by their extensions. On a terminal, the classes are printed as text; into a file or a pipe, each image is one
line of JSON.

An image that cannot be read is reported, and the remaining images are processed.

Exit codes: 0 all images were predicted, 1 some cannot be read or the results cannot be written, 2 wrong arguments, 130
interrupted; the results up to the interrupt are written.
"""
import argparse
import json
import logging
import os
import signal
import sys
from contextlib import closing, contextmanager
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any, Dict, Iterator, List, NoReturn, Optional, Set

import numpy as np
import torch
from tqdm import tqdm

import smpconv_models  # noqa: F401 (registers the models with timm)
from smpconv_models.checkpoint import printable
from smpconv_models.training import DeviceOptions, ModelOptions, cli
from smpconv_models.utils import streams
from smpconv_models.utils.atomic_io import atomic_write, check_writable, save_json, save_rows
from smpconv_models.utils.errors import first_line

from .inputs import ModelSource, find_images
from .predictor import ImageLike, Prediction, PredictOptions, Predictor

_MODULE, _SCRIPT = 'python -m smpconv_models.predict', 'smpconv-predict'


def create_parser() -> argparse.ArgumentParser:
    prog = _SCRIPT if Path(sys.argv[0]).stem == _SCRIPT else _MODULE
    parser = cli.Parser(
        prog=prog, description=(__doc__ or '').replace(_MODULE, prog), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'images', nargs='+', metavar='IMAGE', help='image files and folders, - for an image on standard input')
    parser.add_argument(
        '--checkpoint', required=True, metavar='PATH',
        help="checkpoint, run's folder, converted folder, hf-hub:OWNER/NAME or local-dir:FOLDER")
    cli.add_use_ema(parser)
    parser.add_argument('--reparam', action='store_true', help='re-parameterize the model first')
    parser.add_argument(
        '--topk', type=cli.positive_int, default=5, metavar='N', help='number of classes (default: %(default)s)')
    parser.add_argument('--output', metavar='FILE', help='also write the predictions to a .csv or .json file')
    parser.add_argument(
        '--features', metavar='FILE.npy',
        help='write the pooled features, float32 of shape (images, features), NaN for an image that cannot be read')
    parser.add_argument(
        '--heat-map', metavar='DIR', help='write each image under its Grad-CAM heat map (needs the grad-cam package)')
    cli.add_options(parser, PredictOptions, ModelOptions, DeviceOptions)
    return parser


def list_images(paths: List[str]) -> List[ImageLike]:
    """Return the images of files, folders and standard input; raise ValueError if one does not exist."""
    images: List[ImageLike] = []
    if paths.count('-') > 1:
        raise ValueError('images: - is given twice, and standard input has one image')
    for path in paths:
        images += [BytesIO(sys.stdin.buffer.read())] if path == '-' else find_images([path])
    return images


def check_no_input(heat_map: str, paths: List[str]) -> None:
    """Raise ValueError if heat maps were written among the images, for which another run would take them."""
    for path in paths:
        if os.path.isdir(path) and Path(heat_map).resolve().is_relative_to(Path(path).resolve()):
            raise ValueError(f'--heat-map {heat_map} is in the folder of images {path}: name a folder outside of it')


class Results:
    """Files of the predictions, which are written at the end."""

    def __init__(self, output: Optional[str], features: Optional[str], heat_map: Optional[str]) -> None:
        self._output = None if output is None else check_writable(output, '--output', ['.csv', '.json'])
        self._features = None if features is None else check_writable(features, '--features', ['.npy'])
        self._folder = None if heat_map is None else Path(heat_map)
        if self._folder is not None and self._folder.exists() and not self._folder.is_dir():
            raise ValueError(f'--heat-map {heat_map} is not a folder')
        self._rows: List[Dict[str, Any]] = []
        self._vectors: List[Optional[np.ndarray]] = []
        self._names: Set[str] = set()
        self.unreadable = 0

    def add(self, prediction: Prediction) -> Dict[str, Any]:
        """Take one prediction, write its heat map, and return it as plain data."""
        row = prediction.as_dict()
        if prediction.heat_map is not None and self._folder is not None:
            path = self._folder / f'{self._unique(Path(prediction.image).stem)}.heat.png'  # the name of no input
            with _naming('--heat-map', self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
            with _naming('--heat-map', path), atomic_write(path) as temporary:
                prediction.heat_map.save(temporary, format='png')
            row['heat_map'] = str(path)
        self.unreadable += bool(prediction.error)
        self._rows.append(row)
        if self._features is not None:
            self._vectors.append(prediction.features)
        return row

    def _unique(self, stem: str) -> str:
        name, number = stem, 1
        while name in self._names:
            number += 1
            name = f'{stem}-{number}'
        self._names.add(name)
        return name

    def save(self) -> str:
        """Write the files if there is a result, and return their names."""
        if not self._rows:
            return ''
        if self._output is not None:
            with _naming('--output', self._output):
                if self._output.suffix.lower() == '.json':
                    save_json(self._output, self._rows)
                else:
                    save_rows(self._output, [_flat(row) for row in self._rows])
        if self._features is not None:
            size = next((len(vector) for vector in self._vectors if vector is not None), 0)
            missing = np.full(size, np.nan, np.float32)
            with _naming('--features', self._features), atomic_write(self._features) as temporary, \
                    open(temporary, 'wb') as file:
                np.save(file, np.stack([missing if vector is None else vector for vector in self._vectors]))
        return ' and '.join(str(path) for path in (self._output, self._features) if path)


class OutputError(Exception):
    """Results cannot be written."""


@contextmanager
def _naming(name: str, path: Any = '') -> Iterator[None]:
    """Raise OutputError with the name of the output for an OSError of the block."""
    try:
        yield
    except OSError as error:
        raise OutputError(f'{name} {path}'.strip() + f' cannot be written: {error.strerror or error}') from error


def _flat(row: Dict[str, Any]) -> Dict[str, Any]:
    """Return a row of the CSV file: a column of the label, and one of the probability, for each of the classes."""
    flat = {'image': row['image']}
    for rank, ranked in enumerate(row.get('predictions', []), 1):
        flat.update({f'{name}_{rank}': value for name, value in ranked.items()})
    return {**flat, **{name: row[name] for name in ('heat_map', 'error') if name in row}}


def _text(row: Dict[str, Any]) -> str:
    """Return an image's predictions for a terminal, '' for an image that cannot be read."""
    if 'error' in row:
        return ''
    lines = [
        f'  {100 * ranked["probability"]:6.2f} %  {printable(ranked["label"])}' for ranked in row['predictions']]
    return '\n'.join([printable(row['image'], None), *lines, ''])


def main(argv: Optional[List[str]] = None) -> int:
    logging.basicConfig(level=logging.WARNING, format='%(message)s')
    parser = create_parser()
    args = parser.parse_args(argv)
    saved = ''
    try:
        images = list_images(args.images)
        if args.heat_map is not None:
            check_no_input(args.heat_map, args.images)
        results = Results(args.output, args.features, args.heat_map)
        source = ModelSource(
            cli.read_options(args, ModelOptions), [args.checkpoint], use_ema=args.use_ema, reparam=args.reparam,
            img_size=args.img_size)
        loaded, = source.load()
        predictor = Predictor(loaded, cli.read_options(args, PredictOptions), cli.read_options(args, DeviceOptions))
        predictions = predictor.predict(images, args.topk, bool(args.features), bool(args.heat_map))
        try:
            with closing(predictions), tqdm(
                    predictions, desc='predicting', total=len(images), unit='image', leave=False, disable=None) as bar:
                is_read = True
                for image, prediction in zip(images, bar):
                    if isinstance(image, BytesIO):
                        prediction = prediction._replace(image='-')
                    row = results.add(prediction)
                    if prediction.error:
                        bar.write(
                            f'{parser.prog}: {printable(prediction.image, None)} cannot be read: '
                            f'{printable(prediction.error)}', sys.stderr)
                    if is_read:
                        is_read = _print(bar, _text(row) if sys.stdout.isatty() else f'{json.dumps(row)}\n')
                    if not is_read and not (args.output or args.features or args.heat_map):
                        break  # as in a pipe to head
        finally:
            saved = results.save()
    except OutputError as error:
        parser.exit(1, f'{parser.prog}: error: {error}\n')
    except (torch.OutOfMemoryError, MemoryError) as error:
        parser.error(f'out of memory: {first_line(error)}; a smaller --batch-size needs less')
    except (ImportError, OSError, ValueError) as error:
        parser.error(first_line(error))
    except KeyboardInterrupt:
        kept = saved and f'; the results up to the last image are in {saved}'
        parser.exit(130, f'{parser.prog}: interrupted{kept}\n')
    return 1 if results.unreadable else 0


def _print(bar: Any, text: str) -> bool:
    """Write text to standard output; return False if nobody reads it any more."""
    with _naming('standard output'):
        try:
            bar.write(text, sys.stdout, end='')
            sys.stdout.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes the stream at its end
            if not isinstance(error, BrokenPipeError):
                raise
            return False
    return True


def run() -> NoReturn:
    """Run as a program of its own, with this process's streams and signals."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stdout = sys.stdout
    streams.keep_writable()
    if isinstance(stdout, TextIOWrapper):  # results must not be lost without an error, unlike messages
        sys.stdout = stdout
        stdout.reconfigure(errors='backslashreplace')
    sys.exit(main())
