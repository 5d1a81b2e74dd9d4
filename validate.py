#!/usr/bin/env python3
"""Evaluates a checkpoint on the images of one split.

    python validate.py --checkpoint output/digits/model_best.pth.tar
    python validate.py --checkpoint SMPConv_T.pth --model smpconv_t --data-dir IMAGENET
    python validate.py --model resnet18 --data-dir IMAGENET           timm's pretrained weights

A checkpoint of train.py says itself which model and data it is about; options say otherwise. The averaged weights are
taken where there are any, unless --no-use-ema. Prints the accuracy, then all figures as one line of JSON.

Exit codes: 0 done, 2 wrong arguments, checkpoint or data (nothing is written), 130 interrupted.
"""
import argparse
import json
import logging
import sys
from pathlib import Path

import smpconv_models  # noqa: F401 (registers the models with timm)
from smpconv_models.training import config, options, validate


def create_parser() -> argparse.ArgumentParser:
    parser = config.Parser(
        prog='validate.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument('--checkpoint', metavar='FILE', help="train.py's, timm's or the original release's")
    parser.add_argument(
        '--use-ema', action=argparse.BooleanOptionalAction, default=True, help='prefer the averaged weights')
    parser.add_argument('--reparam', action='store_true', help='re-parameterize the model first')
    parser.add_argument('--split', default='validation', help='split to evaluate (default: %(default)s)')
    parser.add_argument('--results-file', metavar='FILE', help='also write the JSON here')
    options.add_data_options(parser)
    options.add_model_options(parser)
    options.add_device_options(parser)
    return parser


def check_writable(path: str) -> None:
    """Raises ValueError now rather than an OSError after the evaluation; leaves nothing behind."""
    is_new = not Path(path).exists()
    try:
        with open(path, 'a'):
            pass
        if is_new:
            Path(path).unlink()
    except OSError as error:
        raise ValueError(f'--results-file {path} cannot be written: {error.strerror}') from error


def main(argv=None) -> int:
    logging.basicConfig(level=logging.WARNING, format='%(message)s')
    parser = create_parser()
    args = parser.parse_args(argv)
    try:
        if args.results_file:
            check_writable(args.results_file)
        result = validate(args)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, 'validate.py: interrupted\n')
    print(
        f'top-1 {result["top1"]:.2f} %, top-5 {result["top5"]:.2f} % of {result["images"]} images '
        f'({result["model"]}, {result["weights"]})'
    )
    print(json.dumps(result))
    if args.results_file:
        Path(args.results_file).write_text(json.dumps(result) + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
