#!/usr/bin/env python3
"""Measure which convolutions are faster by FFT, and whether `method='auto'` selects the faster method.

    python benchmarks/long_conv.py [--device cuda] [--rounds 5]

Measures the forward pass and both gradients in float32 for kernels of growing size. The layers are the paper's and
others; the paper's have 30 channels and batch 64 over sequences as long as the kernel, or 24 channels and 8 images of
32x32. The methods run in turn after their results were compared. Prints the speed-ups over the direct convolution, and
appends to benchmarks/results/long_conv.jsonl.
"""
import argparse
import sys
from typing import Dict, NamedTuple, Tuple

import measure
import torch
from check import relative_error
from tqdm import tqdm

from smpconv_models.layers import causal_conv1d, fft_conv2d


class Case(NamedTuple):
    """Convolution: batch, channels in and out, size of the input, size of the kernel."""
    batch: int
    channels: int
    size: Tuple[int, ...]
    kernel: Tuple[int, ...]

    def __str__(self) -> str:
        return f'{self.batch} x {self.channels} x {"x".join(map(str, self.size))}, {"x".join(map(str, self.kernel))}'


CASES = [
    *(Case(64, 30, (k,), (k,)) for k in (16, 24, 32, 48, 64, 96, 161, 182, 784)),
    *(Case(8, 30, (k,), (k,)) for k in (16, 32, 64, 161)),
    *(Case(1, 30, (k,), (k,)) for k in (32, 100, 161, 784)),
    *(Case(64, 30, (784,), (k,)) for k in (5, 17, 33, 65)),
    *(Case(4, 64, (2000,), (k,)) for k in (9, 33, 65, 129)),
    *(Case(8, 24, (32, 32), (k, k)) for k in (3, 5, 7, 9, 11, 15, 21, 33)),
    *(Case(64, 12, (8, 8), (k, k)) for k in (3, 5, 7, 9, 11)),
    *(Case(8, 48, (16, 16), (k, k)) for k in (5, 9, 13, 17)),
    *(Case(8, 24, (128, 128), (k, k)) for k in (5, 9, 15)),
    *(Case(1, 24, (32, 32), (k, k)) for k in (9, 33)),
    Case(8, 24, (5, 5), (9, 9)),
    *(Case(16, 96, (32, 32), (k, k)) for k in (3, 5, 9, 15)),
    *(Case(16, 128, (512,), (k,)) for k in (9, 33, 65, 161, 512)),
    *(Case(16, 256, (500,), (k,)) for k in (9, 33, 129, 500)),
    *(Case(2, 256, (16, 16), (k, k)) for k in (3, 7, 15)),
    *(Case(64, 96, (200,), (k,)) for k in (5, 33, 200)),
]


def measured(case: Case, device: str, rounds: int) -> Dict[str, float]:
    """Return the seconds of forward pass and gradients by method."""
    convolve = causal_conv1d if len(case.size) == 1 else fft_conv2d
    x = torch.randn(case.batch, case.channels, *case.size, device=device, requires_grad=True)
    weight = torch.randn(case.channels, case.channels, *case.kernel, device=device, requires_grad=True)
    gradient = torch.randn_like(x)

    def both(method: str) -> Tuple[torch.Tensor, ...]:
        y = convolve(x, weight, method=method)
        return (y, *torch.autograd.grad(y, (x, weight), gradient))

    for fft, direct in zip(both('fft'), both('direct')):
        error = relative_error(fft, direct)
        if not error <= 1e-4:  # also for NaN
            sys.exit(f'{case}: the FFT differs by {error:.1e}: nothing is timed')
    methods = ('fft', 'direct', 'auto')
    return measure.interleaved({method: (lambda method=method: both(method)) for method in methods}, rounds, 5., device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--rounds', type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    for case in tqdm(CASES, desc='cases', leave=False, disable=None):
        seconds = measured(case, args.device, args.rounds)
        ratio, auto = (seconds['direct'] / seconds[method] for method in ('fft', 'auto'))
        tqdm.write(
            f'{case!s:32} direct {seconds["direct"] * 1e3:8.1f} ms  FFT {ratio:5.2f} times as fast, auto {auto:5.2f}')
        measure.append(measure.RESULTS / 'long_conv.jsonl', {**case._asdict(), 'seconds': seconds}, args.device)
    return 0


if __name__ == '__main__':
    sys.exit(main())
