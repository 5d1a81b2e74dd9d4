#!/usr/bin/env python3
"""Evaluate checkpoints, or models with their pretrained weights, on the images of one split.

    python validate.py --checkpoint output/digits                     best checkpoint of a run, on its own data
    python validate.py --checkpoint SMPConv_T.pth --model smpconv_t --data-dir IMAGENET
    python validate.py --checkpoint a.pth.tar b.pth.tar c.pth.tar --data-dir IMAGENET --results-file results.csv
    python validate.py --model resnet18 resnet50 --data-dir IMAGENET           timm's pretrained weights
    python validate.py --checkpoint output/digits --per-class-results classes.csv --confusion-matrix confusion.png

A checkpoint of train.py describes its model and how images are prepared; options override the description. Of its data
it may name an embedded data set or an image folder of this machine; everything else is given by options. Of the model's
weights and the EMA weights, those are evaluated that the checkpoint names as better, otherwise EMA. The accuracy is
printed, then all figures as one line of JSON; for several models, each accuracy as soon as it is known, then a table
and a list. All files are checked before the first evaluation; an evaluation that fails is reported, and the others
continue.

Exit codes: 0 finished, 1 the results cannot be printed, 2 wrong arguments, checkpoint or data (of a single model:
nothing is written), 130 interrupted.
"""
import argparse
import importlib.util
import json
import logging
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any, Dict, List, NoReturn, Optional

# Ctrl-C while PyTorch is imported ends without a traceback. For a console script, setup.py installs this file as
# smpconv_programs.validate, which DataLoader workers may import too.
if __name__ == '__main__' or (__package__ == 'smpconv_programs' and multiprocessing.parent_process() is None):
    signal.signal(signal.SIGINT, lambda *_: (
        os.write(2, f'{os.path.basename(sys.argv[0])}: interrupted\n'.encode()), os._exit(130)))

# Set before torch loads OpenMP, whose threads spin otherwise on the cores that DataLoader workers need.
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

import smpconv_models  # noqa: F401 (registers the models with timm)
from smpconv_models.training import (
    DataOptions,
    DebugOptions,
    DeviceOptions,
    DistributedContext,
    EvalOptions,
    ModelOptions,
    cli,
    describe_error,
    evaluate_model,
    expand_model_list,
    ineffective_options,
    save_confusion_matrix,
    save_per_class_results,
    save_results,
)
from smpconv_models.utils import streams
from smpconv_models.utils.atomic_io import check_writable

PROG = 'smpconv-validate' if __package__ == 'smpconv_programs' else 'validate.py'

# Columns of the table of several models: heading, key, format.
COLUMNS = (
    ('model', 'model', ''), ('top-1 %', 'top1', '.2f'), ('top-5 %', 'top5', '.2f'), ('loss', 'loss', '.4f'),
    ('images', 'images', 'd'), ('unreadable', 'unreadable', 'd'), ('size', 'img_size', 'd'),
    ('M parameters', 'param_count', '.2f'), ('weights', 'weights', ''), ('checkpoint', 'checkpoint', ''),
)


def create_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog=PROG, description=cli.manual(__doc__, PROG), formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, conflict_handler='resolve')
    parser.add_argument(
        '--checkpoint', metavar='FILE', nargs='+', default=[],
        help="checkpoint of train.py, timm or the original release, or a run's folder for its best checkpoint")
    cli.add_use_ema(parser)
    parser.add_argument('--reparam', action='store_true', help='re-parameterize the model first')
    parser.add_argument(
        '--split', metavar='NAME', help="split to evaluate (default: the checkpoint's, otherwise validation)")
    parser.add_argument(
        '--results-file', metavar='FILE', help='also write the results, as a table if FILE ends in .csv, else as JSON')
    parser.add_argument(
        '--per-class-results', metavar='FILE.csv',
        help='write the accuracy of each class, and the class it is most mistaken for')
    parser.add_argument('--confusion-matrix', metavar='FILE.png', help='draw the confusion matrix')
    cli.add_folder(parser)
    cli.add_options(parser, DataOptions, ModelOptions, DeviceOptions, DebugOptions)
    parser.add_argument(  # replaces the option of a single model
        '--model', metavar='NAME', nargs='+', default=[],
        help='models of this package or of timm: one for all checkpoints or one for each (default: their own)')
    return parser


def check_outputs(args: argparse.Namespace, checkpoints: List[str], count: int) -> None:
    """Raise ValueError before the evaluation if a file cannot be written; leave nothing behind."""
    used = {Path(path).resolve(): '--checkpoint' for path in checkpoints}
    for option, suffix in (('--results-file', ''), ('--per-class-results', '.csv'), ('--confusion-matrix', '.png')):
        path = getattr(args, option[2:].replace('-', '_'))
        if not path:
            continue
        if not path.endswith(suffix):
            raise ValueError(f'{option} takes the name of a {suffix} file, got {path}')
        if suffix and count > 1:
            raise ValueError(f'{option} works with a single model, got {count}')
        file = Path(path).resolve()
        if file in used:
            raise ValueError(f'{option} {path} is the file of {used[file]} too')
        used[file] = option
        check_writable(str(file), option)
    if args.confusion_matrix and importlib.util.find_spec('matplotlib') is None:
        raise ValueError('--confusion-matrix needs matplotlib: pip install matplotlib')


def evaluate_all(
        parser: argparse.ArgumentParser, args: argparse.Namespace, each: List[EvalOptions]) -> List[Dict[str, Any]]:
    """Evaluate models one by one; print and write each result, and return those that could be evaluated."""
    results: List[Dict[str, Any]] = []
    before = None
    for options in each:
        try:
            evaluation = evaluate_model(
                options, before, with_confusion=bool(args.per_class_results or args.confusion_matrix))
        except Exception as error:
            line = describe_error(
                error, DistributedContext(), options.data.batch_size, options.data.workers)
            if line is None:
                raise
            if len(each) == 1:
                parser.error(line)
            name = options.name
            sys.stderr.write(f'{parser.prog}: error: {line if name in line else f"{name}: {line}"}\n')
            continue
        before = evaluation.options
        results.append(evaluation.result)
        print((f'{options.name}: ' if len(each) > 1 else '') + sentence(evaluation.result), flush=True)
        if args.results_file:
            save_results(args.results_file, results if len(each) > 1 else results[0])
        if args.per_class_results:
            save_per_class_results(args.per_class_results, evaluation)
        if args.confusion_matrix:
            save_confusion_matrix(args.confusion_matrix, evaluation)
    return results


def sentence(result: Dict[str, Any]) -> str:
    without = f', without {result["unreadable"]} that cannot be read' if result['unreadable'] else ''
    return (
        f'top-1 {result["top1"]:.2f} %, top-5 {result["top5"]:.2f} %, F1 {result["f1"]:.2f} % of {result["images"]}'
        f'{without} ({result["model"]}, {result["weights"]})'
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
    checkpoints, models, args.model = args.checkpoint, args.model, None
    if not checkpoints and not models:
        parser.error('--checkpoint or --model is needed, e.g. --checkpoint output/digits')
    options = EvalOptions(
        cli.read_options(args, DataOptions), cli.read_options(args, ModelOptions),
        cli.read_options(args, DeviceOptions),
        use_ema=args.use_ema, reparam=args.reparam, split=args.split)
    cli.set_debug_logging(args.debug)
    for line in ineffective_options(parser, args):
        logging.warning(line)
    try:
        each = expand_model_list(options, checkpoints, models)
        check_outputs(args, [own.checkpoint for own in each if own.checkpoint], len(each))
        results = evaluate_all(parser, args, each)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, f'{PROG}: interrupted\n')
    if len(each) > 1 and results:
        print(f'\n{table(results)}\n')
    if results:
        print(json.dumps(results if len(each) > 1 else results[0]))
    lost = streams.output_error()
    if lost is not None:
        parser.exit(1, f'{PROG}: error: standard output cannot be written: {lost.strerror}\n')
    return 0 if len(results) == len(each) else 2


def run() -> NoReturn:
    """Run as a program of its own, with this process's streams and signals."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    streams.keep_writable()
    sys.exit(main())


if __name__ == '__main__':
    run()
