#!/usr/bin/env python3
"""Makes a model ready for deployment, in every format that this machine can make, and says what each is worth.

    python examples/export.py --model smpconv_t --output FOLDER                      random weights: for sizes and times
    python examples/export.py --checkpoint output/digits/model_best.pth.tar --output FOLDER
    python examples/export.py --checkpoint FILE --output FOLDER --formats onnx int8 --calibration IMAGES

The model is re-parameterized: kernels drawn once, small kernels merged, batch norms folded. Each format is then run on
images of several batch and map sizes and compared with the model itself:

    onnx          timm's exporter (TorchScript); batch, height and width are free, here and in all others
    onnx-dynamo   torch.onnx.export(dynamo=True)
    torch-export  torch.export.save
    aotinductor   compiled ahead of time for this kind of CPU; needs a C++ compiler, as does compile. It believes that
                  images are contiguous, as its example was: of others (channels_last) it computes something else
    torchscript   torch.jit.script
    compile       torch.compile; leaves no file
    float16, bfloat16    weights and arithmetic; the file has the re-parameterized weights. float16 is for GPUs, as few
                  CPUs have its arithmetic: on others it takes seconds
    int8          onnxruntime, static: weights and maps, for which ranges are taken from images: those of --calibration,
                  the digits, or noise where the weights are random too
    int8-dynamic  onnxruntime, ranges taken anew from each map; it has no fast depthwise convolutions for that

Prints a table, with the accuracy where the checkpoint is of the digits, and writes it to FOLDER/export.json: the
file's size, median milliseconds for one image (formats in turn, in random order, channels_last), and the largest
difference over the largest logit, of which formats in float32 may have 1e-4, others less than 1 (random weights magnify
what they lose). A format that a missing library or compiler prevents has a line with the reason.

Exit codes: 0 done, 1 a format failed (one that cannot be made here: if it was asked for by name), 2 wrong arguments, no
checkpoint, or a folder that cannot be written, 130 interrupted.
"""
import argparse
import copy
import functools
import importlib
import json
import logging
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, NoReturn, Optional, Sequence, Tuple

from smpconv_models.utils.errors import first_line

if __name__ == '__main__':  # Ctrl-C while PyTorch loads is no more than that
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b'export.py: interrupted\n'), os._exit(130)))

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # or threads of one format spin while the next one is timed

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from tqdm import tqdm

import smpconv_models  # noqa: F401 (registers the models with timm)
from smpconv_models import checkpoint, hub
from smpconv_models.utils import streams

TOLERANCE = 1e-4            # of formats in float32
MOST_LOW_PRECISION = 1.     # of the others: outputs of zero differ by so much
MOST_SECONDS = 5.           # of timing for each format
CALIBRATION_IMAGES = 256
SIZES = ((1, 1, 1), (2, 1.4, 1.1), (3, 1, 1), (5, 0.7, 1.2))  # batch, height and width over the model's own

ONNX_INPUT = 'input'

Run = Callable[[Tensor], Tensor]


class Unavailable(Exception):
    """A library or a compiler is missing."""


class Failed(Exception):
    """A format could not be made, or computes something else."""


class Subject(NamedTuple):
    """What is exported.

    Attributes:
        model: Re-parameterized, in evaluation, channels_last.
        example: Images ``(2, C, H, W)`` of the model's own size.
        calibration: Images ``(N, C, H, W)`` as they come from users, or None where there are none.
        held_out: Images and classes of the digits, where it was trained on them.
    """
    model: Any
    example: Tensor
    calibration: Optional[Tensor]
    held_out: Optional[Tuple[Tensor, Tensor]]


# --- what is exported ---


def load(model: Optional[str], path: Optional[str], images: Optional[str]) -> Subject:
    """The model of a name, with random weights, or of a checkpoint, and images for it.

    Raises:
        ValueError: There is no such model, checkpoint or folder of images.
    """
    if path is None:
        if model not in timm.list_models('smpconv*'):
            raise ValueError(f'--model must be one of {timm.list_models("smpconv*")}, got {model!r}')
        torch.manual_seed(0)
        network, dataset = timm.create_model(model), None
        fit_norms(network)
    else:
        with tempfile.TemporaryDirectory() as folder:  # converted, the file is checked and says what its images are
            hub.convert(path, Path(folder, 'model'), model)
            network = hub.load(Path(folder, 'model'))
        dataset = checkpoint.describe(checkpoint.load_file(path, lazy=True)).dataset
    if network.num_classes == 0:
        raise ValueError('expected a model with a classifier, got one of 0 classes')
    config = resolve_model_data_config(network)
    transform = create_transform(**config, is_training=False)
    torch.manual_seed(0)
    example = torch.randn(2, *config['input_size'])
    calibration = held_out = None
    if dataset == 'digits':
        calibration, _ = stacked(digits('train', transform), CALIBRATION_IMAGES)
        held_out = stacked(digits('validation', transform))
    elif path is None:
        calibration = torch.randn(16, *config['input_size'])
    if images is not None:
        calibration, _ = stacked(image_folder(images, transform, config['input_size'][0]), CALIBRATION_IMAGES)
    fast = reparameterize_model(network.eval()).to(memory_format=torch.channels_last).requires_grad_(False)
    return Subject(fast, example, calibration, held_out)


def fit_norms(network: Any) -> None:
    """Gives batch norms the statistics of noise: those they are made with let signals vanish in random weights."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.
    network.train()(torch.randn(4, *network.pretrained_cfg['input_size']))


def digits(split: str, transform: Any) -> Any:
    from smpconv_models.training import Digits
    return Digits(split, transform=transform)


def image_folder(folder: str, transform: Any, channels: int) -> Any:
    if not Path(folder).is_dir():
        raise ValueError(f'--calibration must be a folder of class folders of images, found none at {folder}')
    try:
        loader = functools.partial(read_image, mode='L' if channels == 1 else 'RGB')
        return ImageFolder(folder, transform, loader=loader)
    except FileNotFoundError as error:
        raise ValueError(f'--calibration {folder}: {first_line(error)}') from error


def read_image(path: str, mode: str) -> Any:
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f'--calibration {path} cannot be read: {first_line(error)}') from error


def stacked(dataset: Any, most: int = sys.maxsize) -> Tuple[Tensor, Tensor]:
    """Images ``(N, C, H, W)`` and classes ``(N,)``: at most so many, evenly over the data set."""
    images, classes = zip(*(dataset[index] for index in range(0, len(dataset), -(-len(dataset) // most))))
    return torch.stack(images), torch.tensor(classes)


# --- the formats: each makes its file, and returns how to run what is in it ---


def onnx(subject: Subject, path: Path) -> Run:
    from timm.utils.onnx import onnx_export
    needs('onnx', 'onnxruntime')
    onnx_export(subject.model, str(path), subject.example, dynamic_size=True, input_names=[ONNX_INPUT])
    return onnx_session(path)


def onnx_dynamo(subject: Subject, path: Path) -> Run:
    needs('onnx', 'onnxruntime', 'onnxscript')
    sizes = {0: 'batch', 2: 'height', 3: 'width'}
    torch.onnx.export(
        subject.model, (subject.example,), path, dynamo=True, dynamic_shapes=(sizes,), input_names=[ONNX_INPUT],
        output_names=['logits'], external_data=False, verbose=False)
    return onnx_session(path)


def onnx_session(path: Path) -> Run:
    ort = needs('onnxruntime')
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')  # its threads would slow what runs next
    session = ort.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run(None, {ONNX_INPUT: images.contiguous().numpy()})[0])


def torch_export(subject: Subject, path: Path) -> Run:
    torch.export.save(exported(subject), path)
    return torch.export.load(path).module()


def aotinductor(subject: Subject, path: Path) -> Run:
    needs_compiler()
    from torch._inductor import aoti_compile_and_package, aoti_load_package
    aoti_compile_and_package(exported(subject), package_path=str(path))
    package = aoti_load_package(str(path))
    return lambda images: package(images.contiguous())


def exported(subject: Subject) -> torch.export.ExportedProgram:
    free = torch.export.Dim.DYNAMIC
    return torch.export.export(subject.model, (subject.example,), dynamic_shapes=({0: free, 2: free, 3: free},))


def torchscript(subject: Subject, path: Path) -> Run:
    torch.jit.script(subject.model).save(str(path))
    return torch.jit.load(path)


def compiled(subject: Subject, path: Path) -> Run:
    needs_compiler()
    return torch.compile(subject.model, dynamic=True)


def lower(subject: Subject, path: Path, dtype: torch.dtype) -> Run:
    from safetensors.torch import load_file, save
    model = copy.deepcopy(subject.model).to(dtype)
    path.write_bytes(save({name: value.contiguous() for name, value in model.state_dict().items()}))
    model.load_state_dict(load_file(path))
    return lambda images: model(images.to(dtype)).float()


def int8(subject: Subject, path: Path) -> Run:
    needs('onnx')
    quantization = needs('onnxruntime.quantization')
    if subject.calibration is None:
        raise Unavailable('it needs images to calibrate with: --calibration IMAGES')
    with tempfile.TemporaryDirectory() as folder:
        quantization.quantize_static(
            prepared_for_quantization(subject, Path(folder)), path, CalibrationReader(subject.calibration),
            activation_type=quantization.QuantType.QUInt8,
            per_channel=True, reduce_range=True)  # 7 bits of weights: sums of 8 overflow on processors without VNNI
    return onnx_session(path)


class CalibrationReader:
    """Images ``(N, C, H, W)`` as onnxruntime asks for them: batch by batch, then None."""

    def __init__(self, images: Tensor) -> None:
        self.batches = iter(images.split(4))

    def get_next(self) -> Optional[Dict[str, Any]]:
        batch = next(self.batches, None)
        return None if batch is None else {ONNX_INPUT: batch.numpy()}


def int8_dynamic(subject: Subject, path: Path) -> Run:
    needs('onnx')
    quantization = needs('onnxruntime.quantization')
    with tempfile.TemporaryDirectory() as folder:
        quantization.quantize_dynamic(prepared_for_quantization(subject, Path(folder)), path, reduce_range=True)
    return onnx_session(path)


def prepared_for_quantization(subject: Subject, folder: Path) -> Path:
    onnx(subject, folder / 'float32.onnx')
    # symbolic shapes are for transformers, and need sympy
    needs('onnxruntime.quantization.shape_inference').quant_pre_process(
        folder / 'float32.onnx', folder / 'prepared.onnx', skip_symbolic_shape=True)
    return folder / 'prepared.onnx'


# Name -> the file's and what makes it; those that compute in less than float32 may differ.
FORMATS: Dict[str, Tuple[Optional[str], Callable[[Subject, Path], Run]]] = {
    'onnx': ('model.onnx', onnx),
    'onnx-dynamo': ('model_dynamo.onnx', onnx_dynamo),
    'torch-export': ('model_export.pt2', torch_export),
    'aotinductor': ('model_aotinductor.pt2', aotinductor),
    'torchscript': ('model_torchscript.pt', torchscript),
    'compile': (None, compiled),
    'float16': ('model_float16.safetensors', functools.partial(lower, dtype=torch.float16)),
    'bfloat16': ('model_bfloat16.safetensors', functools.partial(lower, dtype=torch.bfloat16)),
    'int8': ('model_int8.onnx', int8),
    'int8-dynamic': ('model_int8_dynamic.onnx', int8_dynamic),
}
LOW_PRECISION = ('float16', 'bfloat16', 'int8', 'int8-dynamic')


def needs(*names: str) -> Any:
    """The last of these modules."""
    for name in names:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            library = name.partition('.')[0]
            raise Unavailable(f"it needs {library}: pip install 'smpconv_models[export]'") from error
    return module


def needs_compiler() -> None:
    from torch._inductor import config
    compilers = [name for name in config.cpp.cxx if name]
    if not any(map(shutil.which, compilers)):
        raise Unavailable(f'it needs a C++ compiler, found no {" or ".join(compilers)}: install one, or name it in CXX')


# --- what each is worth ---


def make(name: str, subject: Subject, folder: Path) -> Tuple[Run, Dict[str, Any]]:
    """Makes and checks a format; its file takes its place only then.

    Returns:
        What runs it, and its row of the table.

    Raises:
        Unavailable: A library or a compiler is missing.
        Failed: It can't be made, or its outputs differ.
    """
    file, function = FORMATS[name]
    with tempfile.TemporaryDirectory(dir=folder, prefix='.making.') as temporary:
        path = Path(temporary, file or name)
        if file:  # of an earlier model
            (folder / file).unlink(missing_ok=True)
        try:
            run = function(subject, path)
            difference = largest_difference(run, subject, SIZES[:2] if name in LOW_PRECISION else SIZES)
            accuracy = measure_accuracy(run, subject)
        except Unavailable:
            raise
        except Exception as error:  # exporters and compilers have each their own
            raise Failed(f'{type(error).__name__}: {first_line(error)}') from error
        most = MOST_LOW_PRECISION if name in LOW_PRECISION else TOLERANCE
        if not difference < most:
            raise Failed(f'its outputs differ by {difference:.1e} of the largest logit, expected less than {most}')
        if file:
            path.replace(folder / file)
    size = (folder / file).stat().st_size if file else None
    return run, {'format': name, 'file': file, 'bytes': size, 'difference': difference, 'top1': accuracy}


def largest_difference(run: Run, subject: Subject, sizes: Sequence[Tuple[int, float, float]]) -> float:
    """Relative to the largest logit, of images in both layouts; NaN where there is one."""
    height, width = subject.example.shape[2:]
    images = subject.example if subject.calibration is None else subject.calibration
    differences = []
    for batch, h, w in sizes:
        size = (round(height * h), round(width * w))
        some = F.interpolate(images[torch.arange(batch) % len(images)], size, mode='bilinear')
        expected = subject.model(some)
        for layout in (torch.contiguous_format, torch.channels_last):
            difference = run(some.contiguous(memory_format=layout)) - expected
            differences.append(difference.abs().max() / expected.abs().max())
    return torch.stack(differences).max().item()


def measure_accuracy(run: Run, subject: Subject) -> Optional[float]:
    """Top-1 in per cent of the held-out digits."""
    if subject.held_out is None:
        return None
    images, classes = subject.held_out
    return 100 * (run(images).argmax(1) == classes).float().mean().item()


def milliseconds(runs: Dict[str, Run], image: Tensor, rounds: int) -> Dict[str, float]:
    """Median of each, called in turn so that what disturbs the machine disturbs all alike."""
    times: Dict[str, List[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(image)
    for _ in tqdm(range(rounds), desc='timing', leave=False, disable=None):
        for name, run in random.sample(list(runs.items()), len(runs)):  # each meets what the one before it left
            if len(times[name]) < 3 or sum(times[name]) < MOST_SECONDS:
                start = time.perf_counter()
                run(image)
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def table(rows: List[Dict[str, Any]]) -> str:
    with_accuracy = any(row.get('top1') is not None for row in rows)
    lines = [f'{"format":13}  {"MB":>7}  {"ms":>7}  {"difference":>10}' + ('  top-1 %' if with_accuracy else '')]
    for row in rows:
        if 'reason' in row:
            lines.append(f'{row["format"]:13}  {row["reason"]}')
            continue
        megabytes = '-' if row['bytes'] is None else f'{row["bytes"] / 1e6:.2f}'
        accuracy = f'  {row["top1"]:7.2f}' if with_accuracy else ''
        lines.append(
            f'{row["format"]:13}  {megabytes:>7}  {row["milliseconds"]:7.2f}  {row["difference"]:10.1e}{accuracy}')
    return '\n'.join(lines)


# --- the command ---


class Parser(argparse.ArgumentParser):
    """Its errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: error: {message}\n')


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog='export.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--model', metavar='NAME', help='its name (default: smpconv_t, or that of the checkpoint)')
    parser.add_argument('--checkpoint', metavar='FILE', help="train.py's, timm's or the original release's")
    parser.add_argument('--output', metavar='FOLDER', required=True, help='where files go')
    parser.add_argument('--formats', metavar='NAME', nargs='+', choices=list(FORMATS), help='default: all')
    parser.add_argument('--calibration', metavar='IMAGES', help='folder of class folders of images, for int8')
    parser.add_argument('--rounds', metavar='N', type=int, default=21, help='of timing (default: %(default)s)')
    return parser


@torch.no_grad()
def export(subject: Subject, names: List[str], folder: Path, rounds: int) -> List[Dict[str, Any]]:
    """A row for the model itself and for each format; those that couldn't be made have a reason instead of figures."""
    runs: Dict[str, Run] = {'eager': subject.model}
    weights = sum(tensor.nbytes for tensor in subject.model.state_dict().values())
    rows: List[Dict[str, Any]] = [{
        'format': 'eager', 'file': None, 'bytes': weights, 'difference': 0.,
        'top1': measure_accuracy(subject.model, subject)}]
    progress = tqdm(names, leave=False, disable=None)
    for name in progress:
        progress.set_description(name)
        try:
            runs[name], row = make(name, subject, folder)
        except (Failed, Unavailable) as error:
            row = {'format': name, 'reason': str(error), 'failed': isinstance(error, Failed)}
        rows.append(row)
    image = subject.example[:1].to(memory_format=torch.channels_last)
    times = milliseconds(runs, image, rounds)
    return [{**row, 'milliseconds': times[row['format']]} if row['format'] in times else row for row in rows]


def save(path: Path, content: Dict[str, Any]) -> None:
    temporary = path.with_name(f'.{path.name}')
    temporary.write_text(json.dumps(content, indent=2) + '\n')
    temporary.replace(path)


def main(argv: Optional[List[str]] = None) -> int:
    warnings.filterwarnings('ignore', message=r'.*torch\.jit.*deprecated')
    warnings.filterwarnings('ignore', message='No complete tensor found')  # of weights on other devices than the CPU
    logging.getLogger().setLevel(logging.ERROR)  # the quantizer advises what was done already
    parser = create_parser()
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f'--rounds must be at least 1, got {args.rounds}')
    folder = Path(args.output)
    if folder.exists() and not folder.is_dir():
        parser.error(f'--output {folder} is not a folder')
    path = args.checkpoint
    if path and Path(path).is_dir():  # a run's
        path = str(Path(path, 'model_best.pth.tar'))
    try:
        subject = load(args.model or (None if path else 'smpconv_t'), path, args.calibration)
        folder.mkdir(parents=True, exist_ok=True)
        rows = export(subject, list(dict.fromkeys(args.formats or FORMATS)), folder, args.rounds)
        save(folder / 'export.json', {
            'model': args.checkpoint or args.model or 'smpconv_t', 'input_size': list(subject.example.shape[1:]),
            'threads': torch.get_num_threads(), 'torch': torch.__version__, 'formats': rows})
    except (OSError, ValueError) as error:
        parser.error(first_line(error))
    except KeyboardInterrupt:
        parser.exit(130, f'{parser.prog}: interrupted\n')
    print(table(rows))
    missed = [row for row in rows if 'reason' in row and (row['failed'] or args.formats)]
    return 1 if missed else 0


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    streams.keep_writable()
    sys.exit(main())
