#!/usr/bin/env python3
"""Measure the memory of a detector in training on the CPU, on one image of a usual size in detection.

    python benchmarks/detection_memory.py [--backbone smpconv_mobile31 --detector fasterrcnn --grad-checkpointing]

Reports the largest resident set of the process, including Python and PyTorch, after one step of forward, backward and
AdamW on an 800x1333 image with twenty boxes, and after more steps. glibc's allocator does not return all freed memory;
it returns more with MALLOC_MMAP_THRESHOLD_=1000000 in the environment, which is recorded. By default all layers are
trained and no batch norm is frozen, which takes the most memory. --fine-tuning trains the last three layers with frozen
norms, as is usual with pretrained weights. Appends to benchmarks/results/detection_memory.jsonl.
"""
import argparse
import os
import resource
import sys
from pathlib import Path
from typing import Any

import measure
import torch
import torchvision
from tqdm import tqdm

import smpconv_models
from smpconv_models import detection
from smpconv_models.training import param_groups

SIZE = 800, 1333
BOXES = 20
STEPS = 4


def peak_gib() -> float:
    """Return the largest resident set of this process so far."""
    if sys.platform == 'linux':  # getrusage also counts that of the process which started this one
        line, = (line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmHWM:'))
        return int(line.split()[1]) / 2 ** 20
    unit = 1 if sys.platform == 'darwin' else 2 ** 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def target() -> Any:
    """Return boxes over the whole image, with sides of at least 32 pixels."""
    corners = torch.rand(BOXES, 2) * torch.tensor([SIZE[1] - 400, SIZE[0] - 400])
    sides = 32 + torch.rand(BOXES, 2) * 368
    return {'boxes': torch.cat([corners, corners + sides], 1), 'labels': torch.randint(1, 91, (BOXES,))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--backbone', default='smpconv_mobile31')
    parser.add_argument('--detector', default='fasterrcnn', choices=('fasterrcnn', 'fcos', 'retinanet'))
    parser.add_argument('--grad-checkpointing', action='store_true', help='stages are computed again, not kept')
    parser.add_argument('--fine-tuning', action='store_true', help='three layers are trained, batch norms are frozen')
    args = parser.parse_args()
    torch.manual_seed(0)
    backbone = detection.fpn_backbone(
        args.backbone, trainable_layers=3 if args.fine_tuning else None, frozen_bn=args.fine_tuning)
    if args.grad_checkpointing:
        backbone.set_grad_checkpointing()
    model = getattr(detection, args.detector)(backbone, num_classes=91)
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.05), lr=1e-4)
    images, targets = [torch.rand(3, *SIZE)], [target()]
    peaks = [peak_gib()]
    for _ in tqdm(range(STEPS), desc='steps', leave=False, disable=None):
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        smpconv_models.clip_radius_(model)
        peaks.append(peak_gib())
    if not loss.isfinite():
        sys.exit(f'the loss is {loss.item()}: nothing is stored')
    print(f'{args.detector} with {args.backbone} at {SIZE[0]}x{SIZE[1]}, peak in GiB: '
          f'{peaks[0]:.2f} before, {peaks[1]:.2f} after one step, {peaks[-1]:.2f} after {STEPS}')
    measure.append(measure.RESULTS / 'detection_memory.jsonl', {
        **vars(args), 'mmap_threshold': os.environ.get('MALLOC_MMAP_THRESHOLD_'), 'size': SIZE,
        'peak_gib': [round(peak, 3) for peak in peaks],
        'torchvision': torchvision.__version__, 'version': smpconv_models.__version__})
    return 0


if __name__ == '__main__':
    sys.exit(main())
