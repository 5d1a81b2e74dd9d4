#!/usr/bin/env python3
"""Measure the depthwise convolution against PyTorch's, layer by layer, and whole training steps.

    python benchmarks/depthwise.py                          everything; on CUDA if available, otherwise on the CPU
    python benchmarks/depthwise.py --cases t_56 t_28        some layers
    python benchmarks/depthwise.py --cases training_step    the networks only
    python benchmarks/depthwise.py --dtypes bfloat16 float16 float32

For each layer, depthwise_conv2d with backend 'auto' and those of --backends is compared with F.conv2d. Each is called
with NCHW and with channels_last (nhwc) tensors. The four results are y, dx, dw, and all three as in training. First the
functions are checked against float64; a wrong result ends the run. Then the functions are timed in turn, and the
medians are reported. TF32 is off.

The training steps are those of smpconv_t, of the same network with plain convolutions, and of timm's convnext_tiny, in
float32 on the CPU and bfloat16 autocast on CUDA.

Appends to depthwise.jsonl and training_step.jsonl in --results. A run of all cases also saves a plot there.

The last table has ratios of times; lower is better. They are y of auto over the faster of plain's two layouts, and auto
over plain in the same layout, for the worst of y, dx, dw and all. Ratios above 1.05 are marked SLOWER.

Exit codes: 0 done, 1 a result is wrong, 2 wrong arguments, 3 out of memory, 130 interrupted.
"""
import argparse
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import check
import layer
import measure
import report
import torch
import training_step
from arguments import Parser, positive
from cases import CASES, Case
from tqdm import tqdm

import smpconv_models

TRAINING_STEP = 'training_step'
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
DEFAULTS = {'cpu': dict(batch_size=8, dtypes=['float32']), 'cuda': dict(batch_size=64, dtypes=['bfloat16'])}


def parse_args(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = Parser(
        prog='depthwise.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    names = [*CASES, TRAINING_STEP]
    parser.add_argument('--cases', nargs='+', choices=names, metavar='NAME',
                        help=f'cases among {", ".join(names)} (all)')
    parser.add_argument('--device', choices=tuple(DEFAULTS), help='device (cuda if available)')
    parser.add_argument('--dtypes', nargs='+', choices=tuple(DTYPES), metavar='DTYPE',
                        help=f'dtypes among {", ".join(DTYPES)} (float32 on the CPU, bfloat16 on CUDA)')
    parser.add_argument('--backends', nargs='+', metavar='NAME', help="backends besides 'auto' (triton if available)")
    parser.add_argument('--batch-size', type=positive(int), metavar='N', help='batch size (8 on the CPU, 64 on CUDA)')
    parser.add_argument('--rounds', type=positive(int), metavar='N', default=51,
                        help='maximum number of timed calls of each function (%(default)s)')
    parser.add_argument('--seconds', type=positive(float), metavar='S', default=0.5,
                        help='total time after which a function drops out, but not before its third call; ten times as '
                             'much for a training step (%(default)s)')
    parser.add_argument('--results', type=Path, metavar='DIR', default=measure.RESULTS,
                        help='folder to write to (benchmarks/results)')
    parser.add_argument('--picture', type=Path, metavar='FILE',
                        help='plot to write (depthwise_DEVICE.png in --results)')
    args = parser.parse_args(argv)
    _complete(parser, args)
    return args


def _complete(parser: Parser, args: argparse.Namespace) -> None:
    """Set defaults that depend on other options, and check what depends on the machine."""
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: PyTorch finds no such device')
    args.device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    for name, value in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    available = smpconv_models.available_backends(args.device)
    if args.backends is None:
        args.backends = [name for name in available if name == 'triton']
    if unknown := set(args.backends) - set(available):
        parser.error(f'backends on {args.device} are {", ".join(available)}, got {", ".join(sorted(unknown))}')
    if args.cases is None and args.picture is None:
        args.picture = args.results / f'depthwise_{args.device}.png'
    if args.picture and args.picture.suffix not in report.PICTURES:
        parser.error(f'--picture must end in one of {", ".join(report.PICTURES)}, got {args.picture}')
    for option, folder in (('results', args.results), ('picture', args.picture and args.picture.parent)):
        try:
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f'--{option} cannot be written: {error}')


def measure_layer(
        case: Case, dtype: str, batch_size: int, device: torch.device, backends: Sequence[str], rounds: int,
        seconds: float) -> Dict[str, Any]:
    """Measure a layer and return a row with the errors and seconds of every path.

    Args:
        case: Layer.
        dtype: Name of the dtype, one of ``DTYPES``.
        batch_size: Number of images, unless the case has its own.
        device: Device to measure.
        backends: Names of the backends to measure besides 'auto'.
        rounds: Maximum number of timed calls of each function.
        seconds: Total time of the calls after which a function drops out.

    Raises:
        WrongResultError: If a result is wrong; then nothing is timed.
    """
    batch = case.batch or batch_size
    inputs = layer.make_inputs(case, batch, DTYPES[dtype], device)
    paths = layer.paths(backends, *inputs)
    errors = check.check(paths, *inputs)
    medians = {
        result: measure.interleaved(
            {path: functions[result] for path, functions in paths.items()}, rounds, seconds, device)
        for result in report.RESULTS
    }
    return {
        'case': case.name, 'network': case.network, 'times': case.times, 'batch': batch, 'channels': case.channels,
        'height': case.height, 'width': case.width, 'kernel': case.kernel, 'dtype': dtype,
        'errors': errors,
        'seconds': {path: {result: medians[result][path] for result in report.RESULTS} for path in paths},
    }


def run(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.conv.fp32_precision = 'ieee'
    names = args.cases or [*CASES, TRAINING_STEP]
    layers = [(name, dtype) for name in names if name != TRAINING_STEP for dtype in args.dtypes]
    rows = []
    for name, dtype in tqdm(layers, desc='layers', disable=None):
        try:
            row = measure_layer(
                CASES[name], dtype, args.batch_size, device, args.backends, args.rounds, args.seconds)
        except check.WrongResultError as error:
            raise check.WrongResultError(f'{name}, {dtype}: {error}') from error
        rows.append(measure.append(args.results / 'depthwise.jsonl', row, device))
        tqdm.write(report.times(rows[-1:]))
    summarize(rows, args)
    if TRAINING_STEP in names:
        row = training_step.run(args.batch_size, device, args.rounds, 10 * args.seconds)
        print(training_step.text(measure.append(args.results / 'training_step.jsonl', row, device)))


def summarize(rows: List[Dict[str, Any]], args: argparse.Namespace) -> None:
    for dtype in args.dtypes:
        of_dtype = [row for row in rows if row['dtype'] == dtype]
        for table, given in ((report.times, report.sums(of_dtype)), (report.verdicts, of_dtype)):
            if given:
                print(f'\n{table(given)}')
    if rows and args.picture:
        report.picture(rows, args.picture)
        print(f'\npicture: {args.picture}')


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_args(argv)
    try:
        run(args)
    except check.WrongResultError as error:
        print(f'depthwise.py: error: {error}', file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and 'allocate memory' not in str(error):
            raise
        print(f'depthwise.py: error: out of memory: {error}', file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
