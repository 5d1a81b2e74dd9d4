#!/usr/bin/env python3
"""Train a model on images, with timm's parts and timm's names of options.

    python train.py --config digits                                   the embedded digits
    python train.py --data-dir IMAGES --model smpconv_t ...           folders IMAGES/train/CLASS, IMAGES/val/CLASS
    python train.py --dataset torch/cifar10 --data-dir DATA --dataset-download ...
    python train.py --dataset wds/NAME --data-dir DATA ...            also hfds/NAME, and all else that timm reads

    torchrun --nproc_per_node 4 train.py ...                          on 4 GPUs, or 4 processes on a CPU

A row is printed for each epoch. The run's folder, under --output, holds args.yaml, summary.csv, summary.json,
curves.png, model_best.pth.tar, last.pth.tar and, at the end, summary.png (with the learned kernels and their points).
The same command resumes a run that was stopped at any time: on a CPU to the same bits as without the stop.

The parameter groups are the paper's: no weight decay on coordinates, radii, biases and 1-D parameters; radii have a
tenth of the learning rate and are clipped to their range after each step.

Exit codes: 0 finished, 1 failed, 2 wrong arguments or data (nothing is written); stopped and saved: 130 by Ctrl-C, 143
by SIGTERM, 138 by SIGUSR1, 129 by SIGHUP (a closed terminal), 131 by SIGQUIT. Output that cannot be written, to a
closed stream or a full disk, is discarded; the run continues.
"""
import argparse
import logging
import multiprocessing
import os
import signal
import sys
from typing import Any, Dict, NoReturn, Optional

# Ctrl-C while PyTorch is imported ends without a traceback. For a console script, setup.py installs this file as
# smpconv_programs.train, which DataLoader workers may import too.
if __name__ == '__main__' or (__package__ == 'smpconv_programs' and multiprocessing.parent_process() is None):
    signal.signal(signal.SIGINT, lambda *_: (
        os.write(2, f'{os.path.basename(sys.argv[0])}: interrupted\n'.encode()), os._exit(130)))

# Set before torch loads OpenMP, whose threads spin otherwise: on cores that other processes (DataLoader workers) need
# as well, every small loop then waits for a time slice.
# smpconv_nano on 2 busy cores: 1.4 to 6 s a step with spinning threads, 0.1 s without.
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')  # a lost rank is reported in a line, without pages of C++ frames

import smpconv_models  # noqa: F401 (registers the models with timm)
from smpconv_models.training import (
    DistributedContext,
    Trainer,
    TrainingInterrupted,
    TrainOptions,
    build_trainer,
    cli,
    describe_error,
    ineffective_options,
)
from smpconv_models.utils import streams

PROG = 'smpconv-train' if __package__ == 'smpconv_programs' else 'train.py'
_logger = logging.getLogger('smpconv_models.train')


def create_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog=PROG, description=cli.manual(__doc__, PROG), formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument(
        '-c', '--config', metavar='FILE',
        help='YAML file of options, or name of a recipe (such as digits); the command line overrides its values')
    cli.add_folder(parser)
    cli.add_options(parser, *TrainOptions.groups().values())
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
        args = cli.parse_args(parser, argv)
    except ValueError as error:
        parser.error(str(error))
    options = TrainOptions.from_args(args)
    cli.set_debug_logging(options.debugging.debug)
    if world.is_primary:
        for useless in ineffective_options(parser, args):
            logging.warning(useless)

    def explain(error: Exception) -> Optional[str]:
        return describe_error(error, world, options.data.batch_size, options.data.workers, is_training=True)

    try:
        trainer = build_trainer(options, world)
    except ValueError as error:
        _logger.debug('the run could not be set up', exc_info=error)
        parser.error(f'{error}{_rank(world)}')
    except KeyboardInterrupt:
        parser.exit(130, f'{parser.prog}: interrupted before the run began\n')
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        parser.exit(1, f'{parser.prog}: error: {line}{_rank(world)}\n')
    try:
        result = trainer.train()
        world.destroy()  # not after a failure: it may wait for ranks that have ended
    except TrainingInterrupted as stopped:
        return _leave(parser, trainer, f'{stopped}; the same command resumes the run', stopped.exit_code)
    except KeyboardInterrupt:
        return _leave(
            parser, trainer, 'interrupted; the same command resumes the run from its last checkpoint', 130)
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        return _leave(parser, trainer, f'error: {line}', 1)
    finally:
        trainer.close()
    if world.is_primary:
        _print_result(result, trainer.state.rows[-1])
    return 0


def _leave(parser: argparse.ArgumentParser, trainer: Trainer, line: str, code: int) -> int:
    sys.stdout.flush()
    folder = trainer.run_dir.path
    kept = f'the files of the run are in {folder}' if folder.is_dir() else f'the folder {folder} was removed or renamed'
    sys.stderr.write(f'{parser.prog}: {line}; {kept}{_rank(trainer.world)}\n')
    return code


def _rank(world: DistributedContext) -> str:
    return f' (rank {world.rank})' if world.size > 1 else ''


def _print_result(result: Dict[str, Any], row: Dict[str, Any]) -> None:
    weights = other = ''
    if 'ema_top1' in row:
        names = {'state_dict_ema': 'EMA weights', 'state_dict': "model's weights"}
        weights = f', {names[result["best_weights"]]}'
        is_ema = result['weights'] == 'state_dict_ema'
        other = (
            f' ({names[result["weights"]]}; {names["state_dict" if is_ema else "state_dict_ema"]} '
            f'{row["eval_top1" if is_ema else "ema_top1"]:.2f} %)')
    top1, epochs = result['top1'], row['epoch'] + 1
    print(f'validation top-1: {top1:.2f} %{other} after {epochs} epochs in {result["seconds"]:.0f} s')
    gone = '' if os.path.exists(result['checkpoint']) else ', which was removed'
    print(
        f'best checkpoint: {result["checkpoint"]}{gone} (top-1 {result["best_top1"]:.2f} %{weights}, '
        f'epoch {result["best_epoch"]}, chosen by validation top-1)'
    )
    print(f'picture: {result["picture"]}')


def run() -> NoReturn:
    """Run as a program of its own, with this process's streams and signals."""
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


if __name__ == '__main__':
    run()
