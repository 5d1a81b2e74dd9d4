#!/usr/bin/env python3
"""Measure memory and time of the network for raw speech, with kernels as long as its 16,000 steps.

    python benchmarks/speech.py [--batch-size 2] [--limit 20] [--device cuda]

Measures a forward and a backward pass of the whole network in float32, after FFT and direct convolution were compared
on one such layer. The FFT comes first. Its memory is the largest resident set of the process, including Python and
PyTorch; on CUDA it is the largest memory of the device. The direct convolutions follow. They are stopped at the end of
a layer after `--limit` times the time of the FFT. Appends to benchmarks/results/speech.jsonl.
"""
import argparse
import sys
import time
from typing import Any, Optional, Tuple

import measure
import torch
from check import relative_error
from detection_memory import peak_gib

import smpconv_models
from smpconv_models.layers import causal_conv1d


class OutOfTime(Exception):
    """A pass has reached its time limit."""


def compare(device: str) -> None:
    """Compare results and gradients of both methods on one layer with a quarter of the steps."""
    leaves = [torch.randn(*shape, device=device, requires_grad=True) for shape in ((1, 2, 4000), (3, 2, 4000))]
    results = []
    for method in ('fft', 'direct'):
        y = causal_conv1d(*leaves, method=method)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    errors = [relative_error(fft, direct) for fft, direct in zip(*results)]
    if not all(error <= 1e-4 for error in errors):
        sys.exit(f'the FFT differs by {errors}: nothing is timed')


def one_pass(method: str, batch_size: int, device: str, limit: Optional[float] = None) -> Tuple[float, bool]:
    """Return the seconds of a forward and a backward pass, and whether it finished within the limit."""
    torch.manual_seed(0)
    model = smpconv_models.create_sequence_model('smpconv_speech', method=method).to(device)
    x = torch.randn(batch_size, 1, model.sequence_length, device=device)
    start = time.perf_counter()

    def watch(*_: Any) -> None:
        if limit is not None and time.perf_counter() - start > limit:
            raise OutOfTime

    for block in model.blocks:
        for conv in (block.conv1, block.conv2):
            conv.register_forward_hook(watch)
            conv.register_full_backward_hook(watch)
    try:
        loss = model(x).square().sum()
        loss.backward()
        if not loss.isfinite():
            sys.exit('the loss is not finite: nothing is stored')
        return time.perf_counter() - start, True
    except OutOfTime:
        return time.perf_counter() - start, False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch-size', type=int, default=2)
    parser.add_argument(
        '--limit', type=float, default=20., help='limit of the direct convolutions, in multiples of the FFT\'s time')
    parser.add_argument('--device', default='cpu')
    args = parser.parse_args()
    is_cuda = torch.device(args.device).type == 'cuda'
    compare(args.device)
    before = peak_gib()
    seconds = [one_pass('fft', args.batch_size, args.device)[0] for _ in range(3)]
    peak = torch.cuda.max_memory_allocated() / 2 ** 30 if is_cuda else peak_gib()
    fft = sorted(seconds)[1]
    if is_cuda:
        one_pass('direct', args.batch_size, args.device)  # its first call searches for an algorithm
    direct, ended = one_pass('direct', args.batch_size, args.device, args.limit * fft)
    print(f'FFT: {fft:.1f} s, peak {peak:.2f} GiB ({before:.2f} before); '
          f'direct: {"" if ended else "stopped after "}{direct:.0f} s, {"" if ended else "more than "}'
          f'{direct / fft:.1f} times as long')
    measure.append(measure.RESULTS / 'speech.jsonl', {
        'batch_size': args.batch_size, 'fft_seconds': seconds, 'direct_seconds': direct, 'direct_ended': ended,
        'limit': args.limit, 'peak_gib': round(peak, 3), 'peak_gib_before': round(before, 3),
        'version': smpconv_models.__version__,
    }, args.device)
    return 0


if __name__ == '__main__':
    sys.exit(main())
