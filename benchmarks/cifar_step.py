#!/usr/bin/env python3
"""Measure table 1 of the paper: the network for CIFAR10 against deformable and plain 3x3 convolutions.

    python benchmarks/cifar_step.py --device cuda [--method fft]        batches of 64 images of 32x32, as in the paper
    python benchmarks/cifar_step.py                                     batches of 4 on the CPU, in about five minutes
    python benchmarks/cifar_step.py --networks SMPConv 'plain 3x3' --batch-size 64

The networks are smpconv_cifar and variants. In a variant, one convolution replaces each large kernel and the parallel
small one:
- a plain 3x3 convolution;
- a modulated deformable convolution of 3x3, 5x5 or 7x7 (torchvision.ops.DeformConv2d with a mask). A convolution of the
  same size, initialized to zero, predicts offsets and mask. The numbers of parameters are those of the paper's table.

Training is forward, backward and Adam; evaluation is forward. All networks run in turn in float32. Before that, the FFT
and the direct convolutions of smpconv_cifar are compared with float64, and the initial deformable convolutions with
plain ones. All gradients must be finite. Appends to cifar_step.jsonl in --results.

On a CPU, deformable convolutions take seconds for an image. There the batch size is 4, and each function is timed three
times, the minimum for a median. Costs that do not depend on the batch size, such as sampling the kernels and their
transforms, then weigh more than with the paper's batches of 64. This is a disadvantage for SMPConv.

Exit codes: 0 done, 1 a result is wrong, 2 wrong arguments, 130 interrupted.
"""
import argparse
import copy
import sys
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import measure
import timm
import torch
import torch.nn.functional as F
from arguments import positive
from check import WrongResultError, relative_error
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

import smpconv_models  # noqa: F401 (registers the models with timm)
from smpconv_models.layers import SMPConv2d
from smpconv_models.training import cli

OURS = 'SMPConv'
CHECKED_IMAGES = 2
FLOAT32_ERROR = 1e-5  # limit of the other benchmarks for whole networks in float32


class Paper(NamedTuple):
    """Row of table 1, measured on an RTX3090."""
    parameters: str
    seconds_per_epoch: float
    images_per_second: float


PAPER = {
    'deformable 3x3': Paper('0.29M', 61.2, 4390.7),
    'deformable 5x5': Paper('1.37M', 157.3, 1618.9),
    'deformable 7x7': Paper('4.39M', 293.1, 882.3),
    OURS: Paper('0.49M', 40.1, 4258.4),
}


# --- the networks ---


class Deformable(nn.Module):
    """Modulated deformable convolution that predicts its offsets and mask, initially 0 and 1/2."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv = DeformConv2d(in_channels, out_channels, kernel_size, padding=padding, bias=False)
        self.predict = nn.Conv2d(in_channels, 3 * kernel_size ** 2, kernel_size, padding=padding)
        nn.init.zeros_(self.predict.weight)
        nn.init.zeros_(self.predict.bias)

    def forward(self, x: Tensor) -> Tensor:
        offsets, mask = self.predict(x).tensor_split([2 * self.conv.kernel_size[0] ** 2], dim=1)
        return self.conv(x, offsets.contiguous(), mask.sigmoid())


def plain(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)


CONVOLUTIONS: Dict[str, Callable[[int, int], nn.Module]] = {
    'plain 3x3': plain,
    **{f'deformable {size}x{size}': partial(Deformable, kernel_size=size) for size in (3, 5, 7)},
}
NAMES = (OURS, *CONVOLUTIONS)


def make_network(name: str, method: str = 'auto') -> nn.Module:
    if name == OURS:
        return timm.create_model('smpconv_cifar', method=method)
    network = timm.create_model('smpconv_cifar', small_kernel_size=0)
    for parent in list(network.modules()):
        for key, child in parent.named_children():
            if isinstance(child, SMPConv2d):
                setattr(parent, key, CONVOLUTIONS[name](child.in_channels, child.out_channels))
    return network


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# --- the check ---


def check(networks: Dict[str, nn.Module], size: int, device: torch.device) -> None:
    """Raise WrongResultError if a network computes a wrong result."""
    images, labels = random_images(CHECKED_IMAGES, size, device)
    if OURS in networks:
        check_methods(networks[OURS], images)
    for name, network in networks.items():
        for module in network.modules():
            if isinstance(module, Deformable):
                check_deformable(name, module, size)
        trained = copy.deepcopy(network).train()
        gradients = torch.autograd.grad(loss(trained, images, labels), list(trained.parameters()))
        if not all(gradient.isfinite().all() for gradient in gradients):
            raise WrongResultError(f'gradients of {name} are not finite')


@torch.no_grad()
def check_methods(network: nn.Module, images: Tensor) -> None:
    """Check both the FFT and the direct convolution against float64."""
    exact = with_method(network, 'direct').double()(images.double())
    for method in ('direct', 'fft'):
        error = relative_error(with_method(network, method)(images).double(), exact)
        if not error <= FLOAT32_ERROR:  # also for NaN
            raise WrongResultError(f'{OURS} by {method} is wrong: relative error {error:.1e}, limit {FLOAT32_ERROR}')


def with_method(network: nn.Module, method: str) -> nn.Module:
    network = copy.deepcopy(network).eval()
    for module in network.modules():
        if isinstance(module, SMPConv2d):
            module.method = method
    return network


@torch.no_grad()
def check_deformable(name: str, module: Deformable, size: int) -> None:
    """Check against half a plain convolution, which equals zero offsets and a mask of 1/2."""
    weight = module.conv.weight
    x = torch.randn(1, weight.shape[1], size, size, device=weight.device)
    expected = F.conv2d(x, weight / 2, padding=weight.shape[2] // 2)
    error = relative_error(module(x), expected)
    if not error <= FLOAT32_ERROR:
        raise WrongResultError(f'{name} is wrong: relative error {error:.1e}, limit {FLOAT32_ERROR}')


# --- the times ---


def random_images(batch: int, size: int, device: torch.device) -> Any:
    return torch.randn(batch, 3, size, size, device=device), torch.randint(10, (batch,), device=device)


def loss(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(network(images), labels)


def make_step(network: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    network = copy.deepcopy(network).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss(network, images, labels).backward()
        optimizer.step()

    return step


def make_evaluation(network: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    network = copy.deepcopy(network).eval()

    def evaluate() -> Tensor:
        with torch.inference_mode():
            return network(images)

    return evaluate


def measure_all(args: argparse.Namespace) -> Dict[str, Any]:
    """Measure all networks and return a row with their parameters and seconds."""
    device = torch.device(args.device)
    networks = {name: make_network(name, args.method).to(device) for name in args.networks}
    check(networks, args.img_size, device)
    images, labels = random_images(args.batch_size, args.img_size, device)
    steps = {name: make_step(network, images, labels) for name, network in networks.items()}
    evaluations = {name: make_evaluation(network, images) for name, network in networks.items()}
    return {
        'batch': args.batch_size, 'img_size': args.img_size, 'dtype': 'float32', 'optimizer': 'adam',
        'method': args.method, 'rounds': args.rounds,
        'parameters': {name: count(network) for name, network in networks.items()},
        'seconds': measure.interleaved(steps, args.rounds, device=device),
        'evaluation_seconds': measure.interleaved(evaluations, args.rounds, device=device),
    }


def text(row: Dict[str, Any]) -> str:
    """Return the table; ratios are relative to SMPConv, both here and in the paper."""
    lines = [
        '| network | parameters | training step (ms) | / SMPConv | evaluation (images/s) | / SMPConv '
        '| paper: parameters | s/epoch | / SMPConv | images/s | / SMPConv |', '|' + ' --- |' * 11]
    for name, seconds in row['seconds'].items():
        speed = {key: row['batch'] / value for key, value in row['evaluation_seconds'].items()}
        cells = [
            name, f'{row["parameters"][name]:,}', f'{seconds * 1e3:.1f}', ratio(row['seconds'], name),
            f'{speed[name]:.1f}', ratio(speed, name), *paper_cells(name)]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def paper_cells(name: str) -> List[str]:
    if name not in PAPER:
        return [''] * 5
    paper, ours = PAPER[name], PAPER[OURS]
    return [
        paper.parameters, str(paper.seconds_per_epoch), f'{paper.seconds_per_epoch / ours.seconds_per_epoch:.2f}',
        str(paper.images_per_second), f'{paper.images_per_second / ours.images_per_second:.2f}']


def ratio(values: Dict[str, float], name: str) -> str:
    return f'{values[name] / values[OURS]:.2f}' if OURS in values else ''


# --- the command ---


def parse_args(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = cli.Parser(
        prog='cifar_step.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument('--networks', nargs='+', choices=NAMES, default=list(NAMES), metavar='NAME',
                        help=f'networks among {", ".join(NAMES)} (all)')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu', help='device (%(default)s)')
    parser.add_argument('--method', choices=('auto', 'direct', 'fft'), default='auto',
                        help="method of SMPConv's convolutions (%(default)s)")
    parser.add_argument('--batch-size', type=positive(int), metavar='N', help='batch size (4 on the CPU, 64 on CUDA)')
    parser.add_argument('--img-size', type=positive(int), default=32, metavar='N',
                        help='side of the images (%(default)s)')
    parser.add_argument('--rounds', type=positive(int), metavar='N',
                        help=f'timed calls of each function ({measure.MIN_ROUNDS} on the CPU, 51 on CUDA)')
    parser.add_argument('--results', type=Path, metavar='DIR', default=measure.RESULTS,
                        help='folder to write to (benchmarks/results)')
    args = parser.parse_args(argv)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: PyTorch finds no such device')
    args.batch_size = args.batch_size or (64 if args.device == 'cuda' else 4)
    args.rounds = args.rounds or (51 if args.device == 'cuda' else measure.MIN_ROUNDS)
    try:
        args.results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f'--results cannot be written: {error}')
    return args


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_args(argv)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.conv.fp32_precision = 'ieee'
    try:
        row = measure.append(args.results / 'cifar_step.jsonl', measure_all(args), args.device)
    except WrongResultError as error:
        print(f'cifar_step.py: error: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('cifar_step.py: interrupted', file=sys.stderr)
        return 130
    print(text(row))
    print(
        f'\nBatches of {row["batch"]}, {row["img_size"]}x{row["img_size"]}, {row["dtype"]}, method {row["method"]}; '
        f'medians of {row["rounds"]}. {row["device"]}, threads: {row["threads"]}, torch {row["torch"]}, {row["date"]}. '
        'The paper: RTX3090, batches of 64.')
    return 0


if __name__ == '__main__':
    sys.exit(main())
