#!/usr/bin/env python3
"""Measure the overhead of the training loop over forward, backward and optimizer step alone.

    python benchmarks/training_loop.py [--model smpconv_mobile31] [--batch-size 16] [--rounds 11] [--device cpu]

Both use the same network, images and AdamW in one run, and must have made the same step before anything is timed. The
loop loads no images, and has no mixup and no EMA. The third row adds the EMA, as the recipes do. Appends to
benchmarks/results/training_loop.jsonl.
"""
import argparse
import copy
import sys
import tempfile
from typing import Any, Callable, Dict, Tuple

import measure
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smpconv_models.training import TrainOptions, build_trainer, cli, param_groups

PLAIN, LOOP, EMA = 'step alone', 'loop', 'loop with EMA'
CLASSES = 10


def make_run(model: str, device: str, output: str, *more: str) -> Any:
    """Build the trainer of train.py on the embedded digits, whose images are not used."""
    parser = cli.Parser(prog='training_loop.py')
    cli.add_options(parser, *TrainOptions.groups().values())
    return build_trainer(TrainOptions.from_args(parser.parse_args([
        '--model', model, '--dataset', 'digits', '--device', device, '--channels-last', '--smoothing', '0', '--sched',
        'cosine', '--warmup-epochs', '0', '--workers', '0', '--output', output, *more])))


def plain_step(run: Any, images: Tensor, target: Tensor) -> Tuple[nn.Module, Callable[[], None]]:
    """Return a copy of the network and a function that trains it without a loop."""
    model = copy.deepcopy(run.model)
    optimizer = torch.optim.AdamW(param_groups(model, run.options.optimizer.weight_decay), lr=run.options.optimizer.lr)

    def step() -> None:
        F.cross_entropy(model(images), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def loop_step(run: Any, images: Tensor, target: Tensor) -> Callable[[], None]:
    run.model.train()
    return lambda: run.train_step.step(iter([(images, target)]), 0, False)


def measure_steps(model: str, batch_size: int, rounds: int, device: str) -> Dict[str, float]:
    """Return the median seconds of each kind of step."""
    with tempfile.TemporaryDirectory() as output:
        run = make_run(model, device, output, '--experiment', 'loop')
        with_ema = make_run(model, device, output, '--experiment', 'ema', '--model-ema')
        size = run.model.pretrained_cfg['input_size'][-1]
        images = torch.randn(batch_size, 3, size, size, device=device).to(memory_format=torch.channels_last)
        target = torch.randint(CLASSES, (batch_size,), device=device)
        run.model.train()
        plain, step = plain_step(run, images, target)
        steps = {
            PLAIN: step, LOOP: loop_step(run, images, target), EMA: loop_step(with_ema, images, target)}
        for name in (PLAIN, LOOP):
            steps[name]()
        check_same(plain, run.model)
        seconds = measure.interleaved(steps, rounds, device=device)
        run.close()
        with_ema.close()
    return seconds


def check_same(plain: nn.Module, looped: nn.Module) -> None:
    """Exit if the weights differ after one step; only the learning rate of the radii differs, a tenth in the loop."""
    for (name, first), second in zip(plain.named_parameters(), looped.parameters()):
        if not name.endswith('radius') and not torch.equal(first, second):
            sys.exit(f'{name} differs after one step: nothing is timed')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='smpconv_mobile31')
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--rounds', type=int, default=11)
    parser.add_argument('--device', default='cpu')
    args = parser.parse_args()
    seconds = measure_steps(args.model, args.batch_size, args.rounds, args.device)
    measure.append(
        measure.RESULTS / 'training_loop.jsonl',
        {'model': args.model, 'batch': args.batch_size, 'optimizer': 'adamw', 'seconds': seconds}, args.device)
    for name, value in seconds.items():
        print(f'{name:20} {value * 1e3:9.1f} ms   {value / seconds[PLAIN]:.3f} x')
    return 0


if __name__ == '__main__':
    sys.exit(main())
