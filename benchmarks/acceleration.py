#!/usr/bin/env python3
"""Measure accelerate_depthwise on public networks: training step and inference, before and after.

    python benchmarks/acceleration.py
    python benchmarks/acceleration.py --networks convnext_tiny vocos --rounds 11
    python benchmarks/acceleration.py --threads 1 --clock process      on a machine that others use

The networks have random weights and need no download; see networks.py. Each is copied: unchanged, unchanged once more
as a control, and accelerated with `min_kernel_size` 7 (the default), 5 and 3, unless that replaces no more layers than
the larger size. A training step is forward and backward; inference is forward in evaluation mode without gradients.
All copies in both layouts run in turn in float32. The control's ratio shows the noise of the run.

Before a network is measured, outputs in both modes and all gradients in training are compared with float64, for the
first two samples. With the most replacements, the error of the outputs, of the gradient of the input, and of all
parameters' gradients together must be at most twice the error of the unchanged network, or 1e-5. The gradients of each
replaced layer's weight and bias must be within four times that error each. Both errors are rounding, which batch
normalization over few values and ReLU amplify.

Then each different replaced layer is measured by itself, in the layout that it has in the network. The table of layers
lists those that become more than 3 % slower and cost at least 0.5 % of the network's time. Appends a row for each
network to acceleration.jsonl in --results.

Exit codes: 0 done, 1 a result is wrong, 2 wrong arguments, 130 interrupted.
"""
import argparse
import copy
import importlib.util
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import acceleration_report as report
import measure
import torch
from acceleration_report import AFTER, BEFORE, CONTROL, MIN_KERNEL_SIZES, MODES
from arguments import Parser, positive
from check import WrongResultError, relative_error
from networks import NETWORKS, TRANSFORMERS, Sizes
from torch import Tensor, nn
from tqdm import tqdm

import smpconv_models

LAYOUTS = {'nchw': torch.contiguous_format, 'nhwc': torch.channels_last}
CHECKED_SAMPLES = 2
FLOAT32_ERROR = 1e-5  # limit of the other benchmarks for whole networks in float32
LAYER_SECONDS = 0.5  # after which a layer drops out
CLOCKS: Dict[str, Callable[[], float]] = {'wall': time.perf_counter, 'process': time.process_time}

Row = Dict[str, Any]


# --- the networks ---


def with_replacements(network: nn.Module, min_kernel_size: int) -> Tuple[nn.Module, Any]:
    """Return an accelerated copy, and what was replaced."""
    network = copy.deepcopy(network)
    return network, smpconv_models.accelerate_depthwise(network, min_kernel_size=min_kernel_size)


def make_copies(network: nn.Module) -> Tuple[Dict[str, nn.Module], Dict[str, Row]]:
    """Return copies by name, and by size the number of replaced layers, the reasons of the others, and the copy."""
    copies = {BEFORE: network, CONTROL: copy.deepcopy(network)}
    reports: Dict[str, Row] = {}
    name, replaced = BEFORE, 0
    for size in MIN_KERNEL_SIZES:
        accelerated, report = with_replacements(network, size)
        if len(report.replaced) > replaced:
            name, replaced = str(size), len(report.replaced)
            copies[name] = accelerated
        reports[str(size)] = {'replaced': replaced, 'skipped': Counter(report.skipped.values()), 'copy': name}
    return copies, reports


def laid_out(network: nn.Module, x: Tensor, layout: str) -> Tuple[nn.Module, Tensor]:
    """Return a copy of a network and its input in a layout; sequences have one only."""
    network = copy.deepcopy(network)
    if x.ndim < 4:
        return network, x
    return network.to(memory_format=LAYOUTS[layout]), x.contiguous(memory_format=LAYOUTS[layout])


# --- the check ---


class Results(NamedTuple):
    """Outputs and gradients of a network by name, and the names of its parameters' gradients."""
    tensors: Dict[str, Tensor]
    gradients: Dict[str, Tensor]

    @classmethod
    def of(cls, network: nn.Module, x: Tensor) -> 'Results':
        """Run a copy in both modes; the loss weighs each output differently."""
        network, x = copy.deepcopy(network), x.clone().requires_grad_()
        with torch.no_grad():
            inference = network.eval()(x)
        output = network.train()(x)
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view(output.shape)
        trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        dx, *found = torch.autograd.grad(
            (output * weights).sum(), [x, *trained.values()], allow_unused=True, materialize_grads=True)
        together = torch.cat([gradient.flatten() for gradient in found])
        return cls(
            {'output in inference': inference, 'output in training': output.detach(), 'gradient of the input': dx,
             'gradient of all parameters': together},
            dict(zip(trained, found)))


def check(network: nn.Module, x: Tensor, layouts: Sequence[str]) -> Dict[str, Dict[str, float]]:
    """Compare a network before and after with float64.

    Returns:
        The largest relative errors by result, before and after.

    Raises:
        WrongResultError: An error is above its limit, or NaN.
    """
    accelerated, report = with_replacements(network, min(MIN_KERNEL_SIZES))
    replaced = {f'{name}.{kind}' for name in report.replaced for kind in ('weight', 'bias')}
    exact = Results.of(copy.deepcopy(network).double(), x.double())
    errors: Dict[str, Dict[str, float]] = {name: {BEFORE: 0., AFTER: 0.} for name in exact.tensors}
    for layout in layouts:
        before, after = (Results.of(*laid_out(model, x, layout)) for model in (network, accelerated))
        for name, tensor in exact.tensors.items():
            pair = {BEFORE: before.tensors[name], AFTER: after.tensors[name]}
            found = {key: relative_error(given.double(), tensor) for key, given in pair.items()}
            _compare(f'{name}, {layout}', found[BEFORE], found[AFTER], 2)
            errors[name] = {key: max(found[key], error) for key, error in errors[name].items()}
        for name in replaced & exact.gradients.keys():
            of_before, of_after = (
                relative_error(results.gradients[name].double(), exact.gradients[name]) for results in (before, after))
            _compare(f'gradient of {name}, {layout}', of_before, of_after, 4)
    return errors


def _compare(name: str, before: float, after: float, factor: float) -> None:
    limit = max(factor * before, FLOAT32_ERROR)
    if not after <= limit:  # also for NaN
        raise WrongResultError(f'{name} is wrong: relative error {after:.1e}, limit {limit:.1e}, before {before:.1e}')


# --- the times ---


def make_training(network: nn.Module, x: Tensor) -> Callable[[], None]:
    network.train()
    grad = torch.ones(())

    def step() -> None:
        nonlocal grad
        network.zero_grad()
        output = network(x)
        grad = grad if grad.shape == output.shape else torch.randn_like(output)
        output.backward(grad)

    return step


def make_inference(network: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    network.eval()

    def infer() -> Tensor:
        with torch.no_grad():
            return network(x)

    return infer


MAKERS: Dict[str, Callable[[nn.Module, Tensor], Callable[[], object]]] = {
    'training': make_training, 'inference': make_inference}


def time_network(
        copies: Dict[str, nn.Module], x: Tensor, layouts: Sequence[str], rounds: int, seconds: float, device: str,
        clock: str) -> Dict[str, Dict[str, Dict[str, float]]]:
    """Return the median seconds by layout, mode and copy; all are measured in turn."""
    functions = {
        (layout, mode, name): MAKERS[mode](*laid_out(network, x, layout))
        for layout in layouts for mode in MODES for name, network in copies.items()}
    medians = measure.interleaved(functions, rounds, seconds, device, CLOCKS[clock])
    return {
        layout: {mode: {name: medians[layout, mode, name] for name in copies} for mode in MODES} for layout in layouts}


# --- the layers ---


class Layer(NamedTuple):
    """A depthwise convolution and its input, hashable."""
    kernel: Tuple[int, ...]
    stride: Tuple[int, ...]
    padding: Any
    dilation: Tuple[int, ...]
    has_bias: bool
    shape: Tuple[int, ...]
    strides: Tuple[int, ...]

    def conv(self) -> nn.Module:
        kind = nn.Conv2d if len(self.kernel) == 2 else nn.Conv1d
        channels, sizes = self.shape[1], (self.kernel, self.stride, self.padding, self.dilation)
        return kind(channels, channels, *sizes, groups=channels, bias=self.has_bias)  # type: ignore[arg-type]


def layers_of(network: nn.Module, x: Tensor, layout: str) -> Counter[Layer]:
    """Return how often a network calls each different layer that can be replaced."""
    network, x = laid_out(network, x, layout)
    _, report = with_replacements(network, min(MIN_KERNEL_SIZES))
    found: Counter[Layer] = Counter()

    def note(conv: Any, args: Tuple[Tensor], output: Tensor) -> None:
        found[Layer(
            conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.bias is not None, tuple(args[0].shape),
            args[0].stride())] += 1

    for name in report.replaced:
        network.get_submodule(name).register_forward_hook(note)
    with torch.no_grad():
        network.eval()(x)
    return found


def time_layers(
        network: nn.Module, x: Tensor, layouts: Sequence[str], rounds: int, device: str, clock: str) -> Iterator[Row]:
    """Measure each layer before and after, and yield a row by layer and layout in the network."""
    for layout in layouts:
        for layer, times in layers_of(network, x, layout).items():
            maps = torch.empty_strided(layer.shape, layer.strides, device=device).normal_()
            before = nn.Sequential(layer.conv()).to(device)
            if x.ndim == 4:
                before = before.to(memory_format=LAYOUTS[layout])
            after, _ = with_replacements(before, 1)
            functions = {
                (mode, name): MAKERS[mode](copy.deepcopy(conv), maps.clone().requires_grad_(mode == 'training'))
                for mode in MODES for name, conv in ((BEFORE, before), (AFTER, after))}
            medians = measure.interleaved(functions, rounds, LAYER_SECONDS, device, CLOCKS[clock])
            yield {
                'layout': layout, 'times': times, 'kernel': layer.kernel, 'stride': layer.stride,
                'dilation': layer.dilation, 'shape': layer.shape, 'strides': layer.strides,
                'seconds': {mode: {name: medians[mode, name] for name in (BEFORE, AFTER)} for mode in MODES}}


def measure_network(name: str, args: argparse.Namespace) -> Row:
    """Check and measure a network and return its row.

    Raises:
        WrongResultError: If a result is wrong; then nothing is timed.
    """
    torch.manual_seed(0)
    sizes = Sizes(args.batch_size, args.img_size, args.frames)
    network = NETWORKS[name].create().to(args.device)
    x = torch.randn(NETWORKS[name].shape(sizes), device=args.device)
    layouts = NETWORKS[name].layouts
    errors = check(network, x[:CHECKED_SAMPLES], layouts)
    copies, reports = make_copies(network)
    return {
        'network': name, 'input': list(x.shape), 'dtype': 'float32', 'rounds': args.rounds, 'clock': args.clock,
        'errors': errors, 'min_kernel_size': reports,
        'seconds': time_network(copies, x, layouts, args.rounds, args.seconds, args.device, args.clock),
        'layers': list(time_layers(network, x, layouts, args.layer_rounds, args.device, args.clock)),
    }


# --- the command ---


def parse_args(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = Parser(
        prog='acceleration.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument('--networks', nargs='+', choices=NETWORKS, default=list(NETWORKS), metavar='NAME',
                        help=f'networks among {", ".join(NETWORKS)} (all)')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu', help='device (%(default)s)')
    parser.add_argument('--batch-size', type=positive(int), default=4, metavar='N', help='batch size (%(default)s)')
    parser.add_argument('--img-size', type=positive(int), default=224, metavar='N',
                        help='side of the images (%(default)s)')
    parser.add_argument('--frames', type=positive(int), default=400, metavar='N',
                        help='length of the sequences in the blocks (%(default)s)')
    parser.add_argument('--rounds', type=positive(int), default=9, metavar='N',
                        help='timed calls of each network (%(default)s)')
    parser.add_argument('--seconds', type=positive(float), default=5., metavar='S',
                        help='total time after which a copy drops out, after three calls (%(default)s)')
    parser.add_argument('--layer-rounds', type=positive(int), default=21, metavar='N',
                        help='timed calls of each layer (%(default)s)')
    parser.add_argument('--threads', type=positive(int), metavar='N', help="PyTorch's threads (its choice)")
    parser.add_argument('--clock', choices=CLOCKS, default='wall',
                        help="time on the wall, or the process's on the CPU, for one thread (%(default)s)")
    parser.add_argument('--results', type=Path, metavar='DIR', default=measure.RESULTS,
                        help='folder to write to (benchmarks/results)')
    args = parser.parse_args(argv)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: PyTorch finds no such device')
    args.threads = args.threads or torch.get_num_threads()
    if args.clock == 'process' and (args.device == 'cuda' or args.threads > 1):
        parser.error('--clock process takes one thread on the CPU: add --threads 1')
    needing = [name for name in args.networks if name in TRANSFORMERS]
    if needing and importlib.util.find_spec('transformers') is None:
        parser.error(f'--networks {" ".join(needing)}: transformers is not installed')
    try:
        args.results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f'--results cannot be written: {error}')
    return args


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.conv.fp32_precision = 'ieee'
    rows = []
    try:
        for name in tqdm(args.networks, desc='networks', disable=None):
            try:
                row = measure_network(name, args)
            except WrongResultError as error:
                raise WrongResultError(f'{name}: {error}') from error
            rows.append(measure.append(args.results / 'acceleration.jsonl', row, args.device))
    except WrongResultError as error:
        print(f'acceleration.py: error: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('acceleration.py: interrupted', file=sys.stderr)
        return 130
    print(report.text(rows))
    return 0


if __name__ == '__main__':
    sys.exit(main())
