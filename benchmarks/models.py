#!/usr/bin/env python3
"""Measure the cost of sampling the kernels in a whole network, and of creating a network.

    python benchmarks/models.py [--model smpconv_t] [--batch-size 8] [--rounds 11]

Evaluation, float32, channels_last, on the CPU, in one run, after the outputs were compared:
- the model, which samples its kernels in every pass;
- the same network with `nn.Conv2d` of the same kernels in place of every depthwise layer;
- the re-parameterized model.
Also measures the creation of the model against timm's convnext_tiny. Appends to benchmarks/results/models.jsonl.
"""
import argparse
import copy
import sys
from typing import Dict

import measure
import timm
import torch
from check import relative_error
from torch import nn

import smpconv_models


def with_plain_convolutions(model: nn.Module) -> nn.Module:
    """Return a copy with an ``nn.Conv2d`` of the same kernel for every depthwise layer of this package."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, smpconv_models.SMPDepthwiseConv2d):
                kernel = child.kernel()
            elif isinstance(child, smpconv_models.DepthwiseConv2d):
                kernel = child.weight
            else:
                continue
            channels, _, size, _ = kernel.shape
            plain = nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels, bias=False)
            plain.weight.data.copy_(kernel.data)
            setattr(parent, name, plain)
    return model


@torch.inference_mode()
def time_evaluation(model: nn.Module, batch_size: int, rounds: int) -> Dict[str, float]:
    networks = {
        'model': model,
        'plain': with_plain_convolutions(model),
        'reparameterized': timm.utils.reparameterize_model(model),
    }
    images = torch.randn(batch_size, *model.pretrained_cfg['input_size']).to(memory_format=torch.channels_last)
    networks = {name: network.to(memory_format=torch.channels_last) for name, network in networks.items()}
    expected = networks['plain'](images)
    for name, network in networks.items():
        error = relative_error(network(images), expected)
        if error > 1e-5:
            sys.exit(f'{name} differs from plain convolutions by {error:.1e}: nothing is timed')
    return measure.interleaved(
        {name: (lambda network=network: network(images)) for name, network in networks.items()}, rounds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='smpconv_t')
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--rounds', type=int, default=11)
    args = parser.parse_args()
    seconds = time_evaluation(timm.create_model(args.model).eval(), args.batch_size, args.rounds)
    creation = measure.interleaved({
        args.model: lambda: timm.create_model(args.model),
        'convnext_tiny': lambda: timm.create_model('convnext_tiny'),
    }, args.rounds)
    for name, value in seconds.items():
        print(f'{name:16} {value * 1e3:8.1f} ms   {value / seconds["plain"]:.3f} x plain')
    for name, value in creation.items():
        print(f'create {name:13} {value * 1e3:4.0f} ms   {value / creation["convnext_tiny"]:.3f} x convnext_tiny')
    measure.append(measure.RESULTS / 'models.jsonl', {
        'model': args.model, 'batch_size': args.batch_size, 'seconds': seconds, 'creation_seconds': creation})
    return 0


if __name__ == '__main__':
    sys.exit(main())
