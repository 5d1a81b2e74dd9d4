#!/usr/bin/env python3
"""Compare the operation with PyTorch's for sequences, strides, paddings, even kernels and half precision.

    python benchmarks/other_layers.py [--cases conformer stride2_k31] [--rounds 11]

Each case runs in PyTorch's own layout and with the channels last. First the results y, dx and dw are compared with
PyTorch's in float64; then the forward pass alone, and the forward pass with both gradients, are timed in turn with
PyTorch's. Runs on the CPU. Prints the times and PyTorch's time over the operation's, and appends to
benchmarks/results/other_layers.jsonl.
"""
import sys
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple, Union

import arguments
import measure
import torch
import torch.nn.functional as F
from check import relative_error
from torch import Tensor
from tqdm import tqdm

import smpconv_models


class Case(NamedTuple):
    """Layer: size of the input (N, C, L) or (N, C, H, W), kernel, options of the operation, dtype."""
    size: Tuple[int, ...]
    kernel: Tuple[int, ...]
    options: Dict[str, Any] = {}    # noqa: RUF012
    dtype: torch.dtype = torch.float32


CASES = {
    'conformer': Case((8, 256, 1000), (31,)),
    'conformer_short': Case((8, 512, 250), (31,)),
    'conformer_causal': Case((8, 256, 1000), (31,), dict(padding='causal')),
    'conformer_one': Case((1, 512, 400), (31,)),
    'vocos': Case((4, 512, 400), (7,)),
    'audio': Case((2, 64, 16000), (63,)),
    'sequence_stride2': Case((8, 256, 1000), (31,), dict(stride=2, padding=15)),
    'stride2_k31': Case((8, 96, 56, 56), (31, 31), dict(stride=2, padding=15)),
    'stride2_k7': Case((8, 96, 112, 112), (7, 7), dict(stride=2, padding=3)),
    'stride2_k5': Case((8, 240, 28, 28), (5, 5), dict(stride=2, padding=2)),
    'stride2_k3': Case((8, 96, 112, 112), (3, 3), dict(stride=2, padding=1)),
    'valid_k31': Case((8, 96, 56, 56), (31, 31), dict(padding='valid')),
    'even_k16': Case((8, 192, 28, 28), (16, 16)),
    'inception_w': Case((8, 48, 56, 56), (1, 11)),
    'inception_h': Case((8, 48, 56, 56), (11, 1)),
    'float16_k31': Case((2, 96, 56, 56), (31, 31), dtype=torch.float16),
    'float32_k31': Case((2, 96, 56, 56), (31, 31)),
    'bfloat16_k31': Case((2, 96, 56, 56), (31, 31), dtype=torch.bfloat16),
}
LARGEST_ERROR = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
Operation = Callable[[Tensor, Tensor], Tensor]
Results = Tuple[Tensor, ...]


def operations(case: Case) -> Dict[str, Operation]:
    """Return PyTorch's convolution and this package's."""
    options = dict(case.options)
    padding: Union[str, int] = options.setdefault('padding', 'same')
    ours = smpconv_models.depthwise_conv1d if len(case.kernel) == 1 else smpconv_models.depthwise_conv2d
    plain = F.conv1d if len(case.kernel) == 1 else F.conv2d

    def plainly(x: Tensor, weight: Tensor) -> Tensor:
        if padding == 'causal':
            return plain(F.pad(x, (weight.shape[2] - 1, 0)), weight, groups=len(weight))
        return plain(x, weight, groups=len(weight), **options)
    return {'plain': plainly, 'ours': lambda x, weight: ours(x, weight, **options)}


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def step(operation: Operation, x: Tensor, weight: Tensor, grad: Tensor) -> Results:
    """Return y, dx and dw."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = operation(x, weight)
    return (y.detach(), *torch.autograd.grad(y, (x, weight), grad))


def measured(case: Case, is_last: bool, rounds: int, seconds: float) -> Dict[str, Any]:
    """Return the errors and seconds of one case in one layout.

    Raises:
        ValueError: A result is wrong; then nothing is timed.
    """
    lay_out: Callable[[Tensor], Tensor] = channels_last if is_last else torch.clone
    functions = operations(case)
    x, weight = torch.randn(case.size), torch.randn(case.size[1], 1, *case.kernel)
    grad = torch.randn_like(functions['ours'](x, weight))
    x, weight, grad = (tensor.to(case.dtype) for tensor in (x, weight, grad))
    channel = slice(0, 4)       # channels are independent
    few = x[:, channel], weight[channel], grad[:, channel]
    exact = step(functions['plain'], *(tensor.double() for tensor in few))
    x, grad = lay_out(x), lay_out(grad)
    got = step(functions['ours'], x, weight, grad)
    parts = (got[0][:, channel], got[1][:, channel], got[2][channel])
    errors = [relative_error(part.double(), right) for part, right in zip(parts, exact)]
    if not max(errors) <= LARGEST_ERROR[case.dtype]:     # also for NaN
        raise ValueError(f'relative errors {errors} of y, dx, dw above {LARGEST_ERROR[case.dtype]}: nothing is timed')

    def forward(operation: Operation) -> Tensor:
        with torch.no_grad():
            return operation(x, weight)
    return {'errors': errors, 'seconds': {
        'y': measure.interleaved({
            name: (lambda operation=operation: forward(operation)) for name, operation in functions.items()},
            rounds, seconds),
        'all': measure.interleaved({
            name: (lambda operation=operation: step(operation, x, weight, grad))
            for name, operation in functions.items()}, rounds, seconds)}}


def main(argv: Optional[List[str]] = None) -> int:
    parser = arguments.Parser(
        prog='other_layers.py', description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument('--cases', nargs='+', choices=tuple(CASES), metavar='NAME', default=list(CASES),
                        help=f'cases among {", ".join(CASES)} (all)')
    parser.add_argument('--rounds', type=arguments.positive(int), metavar='N', default=21,
                        help='maximum number of timed calls (%(default)s)')
    parser.add_argument('--seconds', type=arguments.positive(float), metavar='S', default=2.,
                        help='total time after which a function drops out (%(default)s)')
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    for name in tqdm(args.cases, desc='cases', leave=False, disable=None):
        case = CASES[name]
        for layout, is_last in (('first', False), ('last', True)):
            try:
                row = measured(case, is_last, args.rounds, args.seconds)
            except ValueError as error:
                print(f'other_layers.py: error: {name}, channels {layout}: {error}', file=sys.stderr)
                return 1
            text = f'{name:18} channels {layout:5}'
            for result, times in row['seconds'].items():
                plain, ours = times['plain'], times['ours']
                text += f'  {result:3} {plain * 1e3:8.2f} and {ours * 1e3:8.2f} ms, {plain / ours:6.2f} x'
            tqdm.write(text)
            measure.append(measure.RESULTS / 'other_layers.jsonl', {
                'case': name, **case._asdict(), 'dtype': str(case.dtype).removeprefix('torch.'),
                'channels_last': is_last, **row})
    return 0


if __name__ == '__main__':
    sys.exit(main())
