#!/usr/bin/env python3
"""Export a model to every format that this machine supports, and compare size, time and accuracy.

    python examples/export.py --model smpconv_t --output FOLDER                      random weights: for sizes and times
    python examples/export.py --checkpoint output/digits/model_best.pth.tar --output FOLDER
    python examples/export.py --checkpoint FILE --output FOLDER --formats onnx int8 --calibration IMAGES

The model is re-parameterized: kernels are sampled once, small kernels merged, batch norms folded. Each format then
runs on images of several batch and map sizes and is compared with the model:

    onnx          timm's exporter (TorchScript); batch, height and width are dynamic, here and in all other formats
    onnx-dynamo   torch.onnx.export(dynamo=True)
    torch-export  torch.export.save
    aotinductor   compiled ahead of time for this kind of CPU; needs a C++ compiler, as does compile. It assumes
                  contiguous images, like its example; for others (channels_last) its results are wrong
    torchscript   torch.jit.script
    compile       torch.compile; writes no file
    float16, bfloat16    weights and arithmetic; the file has the re-parameterized weights. float16 is for GPUs; few
                  CPUs support its arithmetic, and on others it takes seconds
    int8          onnxruntime, static: weights and maps; the ranges come from the images of --calibration, from the
                  digits, or from noise if the weights are random too
    int8-dynamic  onnxruntime, ranges from each map at run time; it has no fast depthwise convolutions for this

Prints a table and writes it to FOLDER/export.json. Its columns are the file's size, the median milliseconds for one
image, and the largest difference over the largest logit. If the checkpoint is of the digits, it has the accuracy too.
The formats are timed in turn, in random order, with channels_last images. The difference may be 1e-4 for float32
formats, and less than 1 for others, because random weights amplify their errors. If a library or compiler is missing,
the row has the reason.

Exit codes: 0 done, 1 a format failed (a missing library counts only for --formats), 2 wrong arguments, no checkpoint,
or a folder that cannot be written, 130 interrupted.
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

if __name__ == '__main__':  # Ctrl-C while PyTorch loads: no traceback
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b'export.py: interrupted\n'), os._exit(130)))

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # otherwise idle threads spin while others are timed

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

TOLERANCE = 1e-4            # for formats in float32
MAX_LOW_PRECISION = 1.      # for the others: the difference of outputs that are all zero
MAX_SECONDS = 5.            # of timing for each format
CALIBRATION_IMAGES = 256
SIZES = ((1, 1, 1), (2, 1.4, 1.1), (3, 1, 1), (5, 0.7, 1.2))  # batch; height and width relative to the model's

ONNX_INPUT = 'input'

Run = Callable[[Tensor], Tensor]


class Unavailable(Exception):
    """A library or a compiler is missing."""


class Failed(Exception):
    """A format could not be exported, or its results are wrong."""


class Subject(NamedTuple):
    """Model to export, with images.

    Attributes:
        model: Re-parameterized model in evaluation mode, channels_last.
        example: Images ``(2, C, H, W)`` of the model's size.
        calibration: Realistic images ``(N, C, H, W)``, or None if there are none.
        validation: Images and classes of the digits, if the model was trained on them.
    """
    model: Any
    example: Tensor
    calibration: Optional[Tensor]
    validation: Optional[Tuple[Tensor, Tensor]]


# --- the model and its images ---


def load(model: Optional[str], path: Optional[str], images: Optional[str]) -> Subject:
    """Create a named model with random weights, or load that of a checkpoint, with images for it.

    Raises:
        ValueError: If the model, the checkpoint or the folder of images does not exist.
    """
    if path is None:
        if model not in timm.list_models('smpconv*'):
            raise ValueError(f'--model must be one of {timm.list_models("smpconv*")}, got {model!r}')
        torch.manual_seed(0)
        network, dataset = timm.create_model(model), None
        recalibrate_bn(network)
    else:
        with tempfile.TemporaryDirectory() as folder:  # conversion validates the file and finds the image settings
            hub.convert(path, Path(folder, 'model'), model)
            network = hub.load(Path(folder, 'model'))
        dataset = checkpoint.describe(checkpoint.load_file(path, lazy=True)).text('dataset')
    if network.num_classes == 0:
        raise ValueError('expected a model with a classifier, got one of 0 classes')
    config = resolve_model_data_config(network)
    transform = create_transform(**config, is_training=False)
    torch.manual_seed(0)
    example = torch.randn(2, *config['input_size'])
    calibration = validation = None
    if dataset == 'digits':
        calibration, _ = stacked(digits('train', transform), CALIBRATION_IMAGES)
        validation = stacked(digits('validation', transform))
    elif path is None:
        calibration = torch.randn(16, *config['input_size'])
    if images is not None:
        calibration, _ = stacked(image_folder(images, transform, config['input_size'][0]), CALIBRATION_IMAGES)
    fast = reparameterize_model(network.eval()).to(memory_format=torch.channels_last).requires_grad_(False)
    return Subject(fast, example, calibration, validation)


def recalibrate_bn(network: Any) -> None:
    """Give batch norms the statistics of noise; with the initial ones, signals vanish in random weights."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.
    network.train()(torch.randn(4, *network.pretrained_cfg['input_size']))


def digits(split: str, transform: Any) -> Any:
    from smpconv_models.training import Digits
    return Digits(split, transform=transform)


def image_folder(folder: str, transform: Any, channels: int) -> Any:
    if not Path(folder).is_dir():
        raise ValueError(f'--calibration takes a folder of class folders of images, found none at {folder}')
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
    """Return at most ``most`` images ``(N, C, H, W)`` and classes ``(N,)``, evenly over the data set."""
    images, classes = zip(*(dataset[index] for index in range(0, len(dataset), -(-len(dataset) // most))))
    return torch.stack(images), torch.tensor(classes)


# --- formats: each function writes its file, and returns a function that runs it ---


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
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')  # or others would slow down
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
        raise Unavailable('needs images to calibrate with: --calibration IMAGES')
    with tempfile.TemporaryDirectory() as folder:
        quantization.quantize_static(
            prepared_for_quantization(subject, Path(folder)), path, CalibrationReader(subject.calibration),
            activation_type=quantization.QuantType.QUInt8,
            per_channel=True, reduce_range=True)  # 7 bits of weights: sums of 8 overflow on processors without VNNI
    return onnx_session(path)


class CalibrationReader:
    """Calibration data for onnxruntime: batches of images ``(N, C, H, W)``, then None."""

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
    # symbolic shape inference is for transformers, and needs sympy
    needs('onnxruntime.quantization.shape_inference').quant_pre_process(
        folder / 'float32.onnx', folder / 'prepared.onnx', skip_symbolic_shape=True)
    return folder / 'prepared.onnx'


# File name and export function of each format.
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
    """Import modules and return the last one; raise Unavailable if one is missing."""
    for name in names:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            library = name.partition('.')[0]
            raise Unavailable(f"needs {library}: pip install 'smpconv_models[export]'") from error
    return module


def needs_compiler() -> None:
    from torch._inductor import config
    compilers = [name for name in config.cpp.cxx if name]
    if not any(map(shutil.which, compilers)):
        raise Unavailable(f'needs a C++ compiler, found no {" or ".join(compilers)}: install one, or name it in CXX')


# --- size, time and accuracy ---


def make(name: str, subject: Subject, folder: Path) -> Tuple[Run, Dict[str, Any]]:
    """Export and check a format; its file is moved to the folder after the check.

    Returns:
        Function that runs the format, and its row of the table.

    Raises:
        Unavailable: If a library or a compiler is missing.
        Failed: If the export fails, or the outputs differ.
    """
    file, function = FORMATS[name]
    with tempfile.TemporaryDirectory(dir=folder, prefix='.making.') as temporary:
        path = Path(temporary, file or name)
        if file:  # the file may be of an earlier model
            (folder / file).unlink(missing_ok=True)
        try:
            run = function(subject, path)
            difference = largest_difference(run, subject, SIZES[:2] if name in LOW_PRECISION else SIZES)
            accuracy = measure_accuracy(run, subject)
        except Unavailable:
            raise
        except Exception as error:  # exporters and compilers raise their own types
            raise Failed(f'{type(error).__name__}: {first_line(error)}') from error
        most = MAX_LOW_PRECISION if name in LOW_PRECISION else TOLERANCE
        if not difference < most:
            raise Failed(f'its outputs differ by {difference:.1e} of the largest logit, expected less than {most}')
        if file:
            path.replace(folder / file)
    size = (folder / file).stat().st_size if file else None
    return run, {'format': name, 'file': file, 'bytes': size, 'difference': difference, 'top1': accuracy}


def largest_difference(run: Run, subject: Subject, sizes: Sequence[Tuple[int, float, float]]) -> float:
    """Return the largest difference relative to the largest logit, for both layouts; NaN if any is NaN."""
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
    """Return the top-1 accuracy in percent on the validation digits, or None for another data set."""
    if subject.validation is None:
        return None
    images, classes = subject.validation
    return 100 * (run(images).argmax(1) == classes).float().mean().item()


def milliseconds(runs: Dict[str, Run], image: Tensor, rounds: int) -> Dict[str, float]:
    """Return the median milliseconds of each format; all run in turn, so that disturbances affect all equally."""
    times: Dict[str, List[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(image)
    for _ in tqdm(range(rounds), desc='timing', leave=False, disable=None):
        for name, run in random.sample(list(runs.items()), len(runs)):  # the order affects caches
            if len(times[name]) < 3 or sum(times[name]) < MAX_SECONDS:
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
    """Parser with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: error: {message}\n')


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog='export.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--model', metavar='NAME', help='model (default: smpconv_t, or that of the checkpoint)')
    parser.add_argument('--checkpoint', metavar='FILE',
                        help="checkpoint of train.py, timm's script or the original release")
    parser.add_argument('--output', metavar='FOLDER', required=True, help='folder to write to')
    parser.add_argument('--formats', metavar='NAME', nargs='+', choices=list(FORMATS), help='formats (default: all)')
    parser.add_argument('--calibration', metavar='IMAGES', help='folder of class folders of images, for int8')
    parser.add_argument('--rounds', metavar='N', type=int, default=21, help='rounds of timing (default: %(default)s)')
    return parser


@torch.no_grad()
def export(subject: Subject, names: List[str], folder: Path, rounds: int) -> List[Dict[str, Any]]:
    """Return a row for the model and each format; a format that failed has a reason instead of numbers."""
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
    warnings.filterwarnings('ignore', message='No complete tensor found')  # about weights on other devices than the CPU
    logging.getLogger().setLevel(logging.ERROR)  # the quantizer recommends steps that were already done
    parser = create_parser()
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f'--rounds must be at least 1, got {args.rounds}')
    folder = Path(args.output)
    if folder.exists() and not folder.is_dir():
        parser.error(f'--output {folder} is not a folder')
    path = args.checkpoint
    if path and Path(path).is_dir():  # folder of a run
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
