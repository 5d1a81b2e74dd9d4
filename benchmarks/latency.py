#!/usr/bin/env python3
"""Measure the time of a re-parameterized model for one image against another network of timm.

    python benchmarks/latency.py [--model smpconv_t] [--against convnext_tiny] [--img-size 224] [--rounds 51]

Evaluation, batch 1, float32, channels_last, on the CPU, in one run. The outputs before and after re-parameterization
are compared first. Appends to benchmarks/results/latency.jsonl.
"""
import argparse
import sys
from typing import Dict

import measure
import timm
import torch
from check import relative_error

import smpconv_models  # noqa: F401 (registers the models with timm)


@torch.inference_mode()
def time_image(name: str, against: str, size: int, rounds: int) -> Dict[str, float]:
    """Return the median seconds of both networks."""
    channels_last: Dict[str, torch.memory_format] = {'memory_format': torch.channels_last}
    image = torch.randn(1, 3, size, size).to(**channels_last)
    model = timm.create_model(name).eval()
    fast = timm.utils.reparameterize_model(model).to(**channels_last)
    error = relative_error(fast(image), model(image))
    if not error <= 1e-5:
        sys.exit(f'{name} re-parameterized differs by {error:.1e}: nothing is timed')
    other = timm.create_model(against).eval().to(**channels_last)
    return measure.interleaved({name: lambda: fast(image), against: lambda: other(image)}, rounds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='smpconv_t')
    parser.add_argument('--against', default='convnext_tiny')
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument('--rounds', type=int, default=51)
    args = parser.parse_args()
    seconds = time_image(args.model, args.against, args.img_size, args.rounds)
    for name, value in seconds.items():
        print(f'{name:18} {value * 1e3:7.1f} ms   {value / seconds[args.against]:.3f} x {args.against}')
    measure.append(measure.RESULTS / 'latency.jsonl', {
        'model': args.model, 'against': args.against, 'img_size': args.img_size, 'batch_size': 1, 'seconds': seconds})
    return 0


if __name__ == '__main__':
    sys.exit(main())
