#!/usr/bin/env python3
"""Trains a model on images, with timm's parts and timm's names for the options.

    python train.py --config recipes/digits.yaml                      the embedded digits
    python train.py --data-dir IMAGES --model smpconv_t ...           folders IMAGES/train/CLASS, IMAGES/val/CLASS
    python train.py --dataset torch/cifar10 --data-dir DATA --dataset-download ...
    python train.py --dataset wds/NAME --data-dir DATA ...            also hfds/NAME: all that timm reads

A row is printed for each epoch. A new folder under --output takes args.yaml, summary.csv, last.pth.tar,
model_best.pth.tar and summary.png (the curves, and the learned kernels with their points). The parameter groups are
the paper's: no weight decay on coordinates, radii, biases and 1-D parameters, radii at a tenth of the rate and clipped
to their range after each step.

Exit codes: 0 done, 1 the loss became infinite or NaN, 2 wrong arguments or data (nothing is written), 130 interrupted.
"""
import argparse
import logging
import os
import sys

# Before torch loads OpenMP, whose threads would else spin: where other processes want the cores too, those that load
# images say, every small loop then waits for a time slice. Nano on 2 busy cores: 1.4 to 6 s a step, so 0.1 s.
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

import smpconv_models  # noqa: F401 (registers the models with timm)
from smpconv_models.training import config, create_folder, options, set_up, train


def create_parser() -> argparse.ArgumentParser:
    parser = config.Parser(
        prog='train.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML file of options; the command line goes first')
    options.add_data_options(parser)
    options.add_model_options(parser)
    options.add_device_options(parser)
    options.add_training_options(parser)
    return parser


def main(argv=None) -> int:
    logging.basicConfig(level=logging.INFO, format='%(message)s', stream=sys.stdout)
    logging.getLogger('timm').setLevel(logging.WARNING)
    parser = create_parser()
    try:
        args = config.parse_args(parser, argv)
        run = set_up(args)
        folder = create_folder(args)
    except ValueError as error:
        parser.error(str(error))
    try:
        result = train(run, folder)
    except FloatingPointError as error:
        parser.exit(1, f'train.py: error: {error}; what was done is in {folder}\n')
    except KeyboardInterrupt:
        parser.exit(130, f'train.py: interrupted; what was done is in {folder}\n')
    print(
        f'top-1 of the held-out images: {result["top1"]:.2f} % after {args.epochs} epochs '
        f'in {result["seconds"]:.0f} s'
    )
    print(
        f'best checkpoint: {result["checkpoint"]} (top-1 {result["best_top1"]:.2f} %, epoch {result["best_epoch"]}, '
        'chosen by these images)'
    )
    print(f'picture: {result["picture"]}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
