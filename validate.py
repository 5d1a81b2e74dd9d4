#!/usr/bin/env python3
"""Evaluates checkpoints, or models with their pretrained weights, on the images of one split.

    python validate.py --checkpoint output/digits                     a run's best, of its own model, on its own data
    python validate.py --checkpoint SMPConv_T.pth --model smpconv_t --data-dir IMAGENET
    python validate.py --checkpoint a.pth.tar b.pth.tar c.pth.tar --data-dir IMAGENET --results-file results.csv
    python validate.py --model resnet18 resnet50 --data-dir IMAGENET           timm's pretrained weights
    python validate.py --checkpoint output/digits --class-results classes.csv --confusion confusion.png

A checkpoint of train.py describes its model and how images are prepared; options come before that. Of its data it may
name an embedded data set or an image folder of this machine; everything else is given by options. The averaged weights
are taken where there are any, unless --no-use-ema. Prints the accuracy, then all figures as one line of JSON; of
several models, each accuracy when it is there, then a table and a list. A file that is no checkpoint is told before the
first evaluation; what fails later is told too, and the others go on.

Exit codes: 0 done, 2 wrong arguments, checkpoint or data (of a single model: nothing is written), 130 interrupted.
"""
import argparse
import importlib.util
import json
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional

if __name__ == '__main__':  # Ctrl-C while PyTorch loads is no more than that
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b'validate.py: interrupted\n'), os._exit(130)))

# Before torch loads OpenMP, whose threads would else spin while the processes that load images want the cores.
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

import smpconv_models  # noqa: F401 (registers the models with timm)
from smpconv_models.training import (
    DistributedContext,
    cli,
    config,
    describe_error,
    measure,
    save_confusion_matrix,
    save_per_class_results,
    save_results,
    series,
)
from smpconv_models.utils import streams

# What the table of several models shows: heading, key, format.
COLUMNS = (
    ('model', 'model', ''), ('top-1 %', 'top1', '.2f'), ('top-5 %', 'top5', '.2f'), ('loss', 'loss', '.4f'),
    ('images', 'images', 'd'), ('unreadable', 'unreadable', 'd'), ('size', 'img_size', 'd'),
    ('M parameters', 'param_count', '.2f'), ('weights', 'weights', ''), ('checkpoint', 'checkpoint', ''),
)


def create_parser() -> argparse.ArgumentParser:
    parser = config.Parser(
        prog='validate.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, conflict_handler='resolve')
    parser.add_argument(
        '--checkpoint', metavar='FILE', nargs='+',
        help="train.py's, timm's or the original release's; the folder of a run means its best")
    parser.add_argument(
        '--use-ema', action=argparse.BooleanOptionalAction, default=True, help='prefer the averaged weights')
    parser.add_argument('--reparam', action='store_true', help='re-parameterize the model first')
    parser.add_argument('--split', metavar='NAME', help="split to evaluate, else the checkpoint's, else validation")
    parser.add_argument(
        '--results-file', metavar='FILE', help='also write a table here if it ends in .csv, else JSON')
    parser.add_argument(
        '--class-results', metavar='FILE.csv', help='write the accuracy of each class, and what it is mistaken for')
    parser.add_argument('--confusion', metavar='FILE.png', help='draw how often each class is taken for which')
    cli.add_data_options(parser)
    cli.add_model_options(parser)
    cli.add_device_options(parser)
    cli.add_debug_option(parser)
    parser.add_argument(  # instead of the single one
        '--model', metavar='NAME', nargs='+',
        help="of this package or of timm's: one for all checkpoints or one for each, else their own")
    return parser


def check_outputs(args: argparse.Namespace, checkpoints: List[str], count: int) -> None:
    """Raises ValueError now rather than an error after the evaluation; leaves nothing behind."""
    used = {Path(path).resolve(): '--checkpoint' for path in checkpoints}
    for option, suffix in (('--results-file', ''), ('--class-results', '.csv'), ('--confusion', '.png')):
        path = getattr(args, option[2:].replace('-', '_'))
        if not path:
            continue
        if not path.endswith(suffix):
            raise ValueError(f'{option} takes the name of a {suffix} file, got {path}')
        if suffix and count > 1:
            raise ValueError(f'{option} is of a single model, got {count}')
        file = Path(path).resolve()
        if file in used:
            raise ValueError(f'{option} {path} is the file of {used[file]} too')
        used[file] = option
        check_writable(option, file)
    if args.confusion and importlib.util.find_spec('matplotlib') is None:
        raise ValueError('--confusion needs matplotlib: pip install matplotlib')


def check_writable(option: str, path: Path) -> None:
    """Raises ValueError unless a file of this name can be written."""
    if path.exists() and not path.is_file():  # a folder; a device, which must not be replaced
        raise ValueError(f'{option} {path} is not a file')
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f'{option} {path} cannot be written: {error.strerror}') from error


def evaluate_all(
        parser: argparse.ArgumentParser, args: argparse.Namespace, each: List[argparse.Namespace],
) -> List[Dict[str, Any]]:
    """The results of those that could be evaluated; told and written one by one."""
    results: List[Dict[str, Any]] = []
    before = None
    for own in each:
        name = own.checkpoint or own.model
        try:
            evaluation = measure(own, before, with_confusion=bool(args.class_results or args.confusion))
        except Exception as error:
            line = describe_error(error, own, DistributedContext())
            if line is None:
                raise
            if len(each) == 1:
                parser.error(line)
            sys.stderr.write(f'{parser.prog}: error: {line if name in line else f"{name}: {line}"}\n')
            continue
        before = evaluation.args
        results.append(evaluation.result)
        print((f'{name}: ' if len(each) > 1 else '') + sentence(evaluation.result), flush=True)
        if args.results_file:
            save_results(args.results_file, results if len(each) > 1 else results[0])
        if args.class_results:
            save_per_class_results(args.class_results, evaluation)
        if args.confusion:
            save_confusion_matrix(args.confusion, evaluation)
    return results


def sentence(result: Dict[str, Any]) -> str:
    without = f', without {result["unreadable"]} that cannot be read' if result['unreadable'] else ''
    return (
        f'top-1 {result["top1"]:.2f} %, top-5 {result["top5"]:.2f} % of {result["images"]}{without} '
        f'({result["model"]}, {result["weights"]})'
    )


def table(results: List[Dict[str, Any]]) -> str:
    rows = [[heading for heading, _, _ in COLUMNS]]
    rows += [[format(result[key], form) for _, key, form in COLUMNS] for result in results]
    widths = [max(map(len, column)) for column in zip(*rows)]
    signs = ['>' if form else '<' for _, _, form in COLUMNS]
    return '\n'.join(
        '  '.join(f'{cell:{sign}{width}}' for cell, sign, width in zip(row, signs, widths)).rstrip() for row in rows)


def main(argv: Optional[List[str]] = None) -> int:
    logging.basicConfig(level=logging.WARNING, format='%(message)s')
    logging.getLogger('smpconv_models').setLevel(logging.INFO)
    parser = create_parser()
    args = parser.parse_args(argv)
    cli.show_causes(args)
    for line in cli.without_effect(parser, args):
        logging.warning(line)
    try:
        each = series(args)
        check_outputs(args, [own.checkpoint for own in each if own.checkpoint], len(each))
        results = evaluate_all(parser, args, each)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, 'validate.py: interrupted\n')
    if len(each) > 1 and results:
        print(f'\n{table(results)}\n')
    if results:
        print(json.dumps(results if len(each) > 1 else results[0]))
    return 0 if len(results) == len(each) else 2


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    streams.keep_writable()
    sys.exit(main())
