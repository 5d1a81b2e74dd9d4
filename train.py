#!/usr/bin/env python3
"""Trains a model on images, with timm's parts and timm's names for the options.

    python train.py --config recipes/digits.yaml                      the embedded digits
    python train.py --data-dir IMAGES --model smpconv_t ...           folders IMAGES/train/CLASS, IMAGES/val/CLASS
    python train.py --dataset torch/cifar10 --data-dir DATA --dataset-download ...
    python train.py --dataset wds/NAME --data-dir DATA ...            also hfds/NAME: all that timm reads

    torchrun --nproc_per_node 4 train.py ...                          on 4 GPUs, or processes on a CPU

A row is printed for each epoch. The folder of the run, under --output, takes args.yaml, summary.csv, summary.json,
curves.png, model_best.pth.tar, last.pth.tar and, at the end, summary.png (with the learned kernels and their points).
The same command goes on from there, wherever it was stopped: on a CPU to the same bits as without the stop.

The parameter groups are the paper's: no weight decay on coordinates, radii, biases and 1-D parameters, radii at a tenth
of the rate and clipped to their range after each step.

Exit codes: 0 done, 1 failed, 2 wrong arguments or data (nothing is written); stopped and saved: 130 by Ctrl-C, 143 by
SIGTERM, 138 by SIGUSR1, 129 by SIGHUP (a closed terminal), 131 by SIGQUIT. Output that cannot be written, to a closed
stream or a full disk, is discarded; the run continues.
"""
import argparse
import logging
import os
import signal
import sys
from typing import Any, Dict

if __name__ == '__main__':  # Ctrl-C while PyTorch loads is no more than that
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b'train.py: interrupted\n'), os._exit(130)))

# Before torch loads OpenMP, whose threads would else spin: where other processes want the cores too, those that load
# images say, every small loop then waits for a time slice. Nano on 2 busy cores: 1.4 to 6 s a step, so 0.1 s.
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')  # a lost process is told in a line, not in pages of C++ frames

import smpconv_models  # noqa: F401 (registers the models with timm)
from smpconv_models.training import (
    DistributedContext,
    TrainingInterrupted,
    build_trainer,
    cli,
    config,
    describe_error,
    train,
)
from smpconv_models.utils import streams

_logger = logging.getLogger('smpconv_models.train')


def create_parser() -> argparse.ArgumentParser:
    parser = config.Parser(
        prog='train.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML file of options; the command line goes first')
    cli.add_data_options(parser)
    cli.add_model_options(parser)
    cli.add_device_options(parser)
    cli.add_training_options(parser)
    cli.add_debug_option(parser)
    return parser


def main(argv=None) -> int:
    parser = create_parser()
    try:
        world = DistributedContext.from_environment()
    except ValueError as error:
        parser.error(str(error))
    logging.basicConfig(level=logging.WARNING, format='%(message)s', stream=sys.stdout, force=True)
    if world.is_primary:
        logging.getLogger('smpconv_models').setLevel(logging.INFO)
    try:
        args = config.parse_args(parser, argv)
    except ValueError as error:
        parser.error(str(error))
    cli.show_causes(args)
    if world.is_primary:
        for useless in cli.without_effect(parser, args):
            logging.warning(useless)
    try:
        run = build_trainer(args, world)
    except ValueError as error:
        _logger.debug('the run could not be set up', exc_info=error)
        parser.error(f'{error}{_of(world)}')
    except KeyboardInterrupt:
        parser.exit(130, f'{parser.prog}: interrupted before the run began\n')
    except Exception as error:
        line = describe_error(error, args, world)
        if line is None:
            raise
        parser.exit(1, f'{parser.prog}: error: {line}{_of(world)}\n')
    try:
        result = train(run)
        run.world.destroy()  # not after a failure: it may wait for processes that are gone
    except TrainingInterrupted as stopped:
        return _leave(parser, run, f'{stopped}; the same command goes on', stopped.exit_code)
    except KeyboardInterrupt:
        return _leave(parser, run, 'interrupted; the same command goes on from the last checkpoint', 130)
    except Exception as error:
        line = describe_error(error, args, world)
        if line is None:
            raise
        return _leave(parser, run, f'error: {line}', 1)
    finally:
        run.close()
    if world.is_primary:
        _tell(result, args)
    return 0


def _leave(parser: argparse.ArgumentParser, run: Any, line: str, code: int) -> int:
    sys.stdout.flush()
    folder = run.folder.path
    kept = f'what was done is in {folder}' if folder.is_dir() else f'the folder {folder} was removed or renamed'
    sys.stderr.write(f'{parser.prog}: {line}; {kept}{_of(run.world)}\n')
    return code


def _of(world: DistributedContext) -> str:
    return f' (process {world.rank})' if world.size > 1 else ''


def _tell(result: Dict[str, Any], args: argparse.Namespace) -> None:
    print(
        f'held-out top-1: {result["top1"]:.2f} % after {args.epochs} epochs '
        f'in {result["seconds"]:.0f} s'
    )
    gone = '' if os.path.exists(result['checkpoint']) else ', which is not there any more'
    print(
        f'best checkpoint: {result["checkpoint"]}{gone} (top-1 {result["best_top1"]:.2f} %, '
        f'epoch {result["best_epoch"]}, chosen by the same)'
    )
    print(f'picture: {result["picture"]}')


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    streams.keep_writable()
    try:
        sys.exit(main())
    except SystemExit as end:
        if not DistributedContext.is_initialized():
            raise
        code = end.code
        if code is not None and not isinstance(code, int):  # as Python does
            print(code, file=sys.stderr)
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)  # threads of the process group, which wait for other ranks, may abort or keep the process
