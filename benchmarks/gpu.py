#!/usr/bin/env python3
"""Check and measure the operation and the networks on a GPU: one command for a GPU that is there for half an hour.

    python benchmarks/gpu.py                          all phases, within 25 minutes
    python benchmarks/gpu.py --phase check            one phase, within 9 minutes
    python benchmarks/gpu.py --device cpu --dry-run   every phase with tiny sizes, and the kernels interpreted

The phases, in this order:
    check    results of every layer and kernel against float64, in both layouts and four precisions; CUDA graphs,
             torch.compile; the tests that are marked `gpu`
    layers   time of every layer beside both layouts of F.conv2d and the minimum that the device's rates permit
    steps    time of a training step of smpconv_t and smpconv_b beside timm's convnext_tiny and inception_next_tiny,
             eager and compiled, and of its kernels by category
    tune     the fastest tiles of the Triton kernels, written to --configs

The checkout need not be installed. It needs PyTorch, Triton, timm and tqdm; pytest for its tests; matplotlib for the
plot. Each phase is a process of its own that ends within its share of the minutes, and appends rows to --results as
it goes: gpu_check.jsonl, depthwise.jsonl, gpu_steps.jsonl, gpu_tiles.jsonl, and the plot gpu_layers.png.

The minutes include the search for a GPU. Times are medians on the device, after a warm-up and with a cold L2 cache.
Clocks are read, never set. For --prediction, see predictions.py: write predictions down before the measurement.

Exit codes: 0 all results are right; 1 a result is wrong, or left out for lack of time, or there is no GPU; 2 wrong
arguments; 130 interrupted; 143 terminated.
"""
import argparse
import functools
import os
import signal
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Set

import limits
from arguments import Parser, positive
from checkout import ROOT
from predictions import Predictions

# Modules by phase, and their shares of the time.
PHASES = {'check': 'gpu_check', 'layers': 'gpu_layers', 'steps': 'gpu_steps', 'tune': 'gpu_tiles'}
SHARES = {'check': 7, 'layers': 5, 'steps': 7, 'tune': 6}
ALL_MINUTES, PHASE_MINUTES = 25., 9.
_SEARCH = 120  # seconds that the search for a GPU may take
_GRACE = 15  # seconds at the end of a phase that only the part in progress may use


def parse_args(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = Parser(
        prog='gpu.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--phase', nargs='+', choices=tuple(PHASES), metavar='PHASE', default=list(PHASES),
                        help=f'phases among {", ".join(PHASES)} (all)')
    parser.add_argument('--minutes', type=positive(float), metavar='M',
                        help=f'time of all phases together ({PHASE_MINUTES:g} for each, at most {ALL_MINUTES:g})')
    parser.add_argument('--device', choices=('cuda', 'cpu'), help='device (cuda, or cpu for a dry run)')
    parser.add_argument('--dry-run', action='store_true', help='tiny sizes, for a CPU')
    parser.add_argument('--results', type=Path, metavar='DIR', help='folder for rows and the plot (benchmarks/results, '
                        'or output/gpu for a dry run)')
    parser.add_argument('--configs', type=Path, metavar='DIR', help="folder for tuned tiles (that of the package, or "
                        "--results for a dry run)")
    parser.add_argument('--prediction', type=Path, metavar='FILE', help='predicted times to compare with')
    args = parser.parse_args(argv)
    args.device = args.device or ('cpu' if args.dry_run else 'cuda')
    if args.device == 'cpu' and not args.dry_run:
        parser.error('--device cpu needs --dry-run')
    if args.device == 'cuda' and args.dry_run:
        parser.error('--dry-run runs on the CPU: remove --device cuda')
    _complete(parser, args)
    return args


def _complete(parser: Parser, args: argparse.Namespace) -> None:
    """Set defaults that depend on other options, read the predictions and create the folders."""
    args.phase = [phase for phase in PHASES if phase in args.phase]
    args.minutes = args.minutes or min(ALL_MINUTES, PHASE_MINUTES * len(args.phase))
    args.results = args.results or (ROOT / 'output/gpu' if args.dry_run else ROOT / 'benchmarks/results')
    args.configs = args.configs or (args.results if args.dry_run else ROOT / 'smpconv_models/ops/_triton/configs')
    try:
        args.predictions = Predictions.read(args.prediction) if args.prediction else Predictions([])
    except ValueError as error:
        parser.error(f'--prediction: {error}')
    for option, folder in (('results', args.results), ('configs', args.configs)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f'--{option} cannot be written: {error}')


def missing() -> Optional[str]:
    """Return in one line what the phases lack here, None if nothing."""
    try:
        import torch

        import smpconv_models
        from smpconv_models.utils.errors import first_line
    except ImportError as error:
        return f'this package cannot be imported here: {error}'
    if torch.version.cuda is None:
        return f'PyTorch {torch.__version__} is built without CUDA: install a build for CUDA'
    if not torch.cuda.is_available():
        return f'PyTorch {torch.__version__} finds no CUDA device: an NVIDIA GPU and its driver are needed'
    x, weight = (torch.ones(1, 1, size, size, dtype=torch.float16, device='cuda') for size in (8, 3))
    try:
        smpconv_models.depthwise_conv2d(x, weight, backend='triton')
    except RuntimeError as error:
        return first_line(error)
    print(f'{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}')
    return None


class Found(NamedTuple):
    """Result of a phase: faults, parts that it left out for lack of time, and predictions that it compared."""
    faults: List[str]
    left_out: List[str]
    compared: Set[int]

    def __str__(self) -> str:
        parts = []
        if self.faults:
            parts.append(f'{len(self.faults)} faults: {"; ".join(self.faults)}')
        if self.left_out:
            parts.append(f'left out for lack of time: {", ".join(self.left_out)}')
        return '; '.join(parts) or 'right'


def run_phase(name: str, args: argparse.Namespace, seconds: float) -> Found:
    """Run a phase within ``seconds``."""
    import importlib

    import torch
    from gpu_run import Settings
    from limits import Deadline
    torch.manual_seed(0)
    if args.dry_run:
        torch.set_num_threads(1)
    settings = Settings(
        torch.device(args.device), args.dry_run, args.results, args.configs, args.predictions,
        Deadline(seconds - _GRACE))
    report = importlib.import_module(PHASES[name]).run(settings)
    return Found(report.faults, report.left_out, args.predictions.compared)


def run(args: argparse.Namespace) -> int:
    """Run the phases and return the exit code."""
    end = limits.Deadline(60 * args.minutes)
    if args.dry_run:
        import smpconv_models  # noqa: F401 (once for all phases; before a fork, a GPU allows no use of CUDA)
    else:
        reason, fault = limits.call(missing, min(_SEARCH, end.left()))
        if fault:
            reason = f'the search for a GPU {fault}'
        if reason:
            print(f'gpu.py: error: {reason}', file=sys.stderr)
            return 1
    found: Dict[str, Found] = {}
    for position, name in enumerate(args.phase):
        seconds = end.left() * SHARES[name] / sum(SHARES[other] for other in args.phase[position:])
        print(f'\n--- {name}: at most {seconds / 60:.1f} minutes', flush=True)
        value, fault = limits.call(functools.partial(run_phase, name, args, seconds), seconds)
        found[name] = Found([fault], [], set()) if fault else value
    print()
    for line in args.predictions.lines_except(set().union(*(each.compared for each in found.values()))):
        print(line)
    for name, each in found.items():
        print(f'{name:8} {each}')
    return 1 if any(each.faults or each.left_out for each in found.values()) else 0


def main(argv: Optional[List[str]] = None) -> int:
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    args = parse_args(argv)
    if args.dry_run:
        os.environ['TRITON_INTERPRET'] = '1'  # before the first import of Triton
    try:
        return run(args)
    except KeyboardInterrupt:
        return 130


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the phase in progress is ended too
    sys.exit(main())
