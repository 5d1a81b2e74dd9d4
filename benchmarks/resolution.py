#!/usr/bin/env python3
"""Measure the effect of resampling kernels for another resolution, on the network of `make train`.

    make train
    python benchmarks/resolution.py [--checkpoint output/digits/model_best.pth.tar]

Prints the top-1 on the validation split (20 %) at other resolutions than the 32x32 of training. The kernels are those
of training, or resampled from the same points (kernel_scale), or the images are resized to the training size instead.
Appends to benchmarks/results/resolution.jsonl.
"""
import argparse
import sys
from pathlib import Path
from typing import Any, Dict

import measure
import timm
import torch
import torch.nn.functional as F
from timm.data import create_transform
from torch import Tensor
from tqdm import tqdm

import smpconv_models
from smpconv_models import checkpoint
from smpconv_models.training import Digits

TRAINED = 32
SIZES = (24, 32, 48, 64)


def images_at(size: int, arguments: Dict[str, Any]) -> Tensor:
    """Return the validation images, ``(N, 1, size, size)``."""
    transform = create_transform(
        (1, size, size), mean=arguments['mean'], std=arguments['std'], interpolation='bicubic', crop_pct=1.)
    return torch.stack([image for image, _ in Digits('validation', transform=transform)])


@torch.no_grad()
def top1(model: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the top-1 accuracy in percent."""
    return round(100 * (model(images).argmax(1) == labels).double().mean().item(), 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--checkpoint', default='output/digits/model_best.pth.tar', metavar='FILE')
    args = parser.parse_args()
    try:
        arguments = checkpoint.get_train_args(checkpoint.load_file(args.checkpoint))
    except ValueError as error:
        parser.error(f'{error}; make train writes one')
    labels = torch.tensor(Digits('validation').labels)
    model = timm.create_model(
        'smpconv_nano', pretrained=True, num_classes=10, in_chans=1,
        pretrained_cfg_overlay=dict(file=str(Path(args.checkpoint)), num_classes=10, input_size=(1, 32, 32))).eval()
    print('size  as trained   resampled  images resized to 32')
    for size in tqdm(SIZES, desc='resolutions', leave=False, disable=None):
        images = images_at(size, arguments)
        model.set_kernel_scale(1)
        trained = top1(model, images, labels)
        resized = top1(model, F.interpolate(images, (TRAINED, TRAINED), mode='bicubic', antialias=True), labels)
        model.set_kernel_scale(size / TRAINED)
        resampled = top1(model, images, labels)
        print(f'{size:4}  {trained:10.2f}  {resampled:10.2f}  {resized:20.2f}')
        measure.append(measure.RESULTS / 'resolution.jsonl', {
            'size': size, 'as_trained': trained, 'resampled': resampled, 'resized': resized, 'images': len(labels),
            'version': smpconv_models.__version__})
    return 0


if __name__ == '__main__':
    sys.exit(main())
