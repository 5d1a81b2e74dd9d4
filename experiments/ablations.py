#!/usr/bin/env python3
"""Run the paper's ablations, tables 6 to 9 on CIFAR10, on scikit-learn's digits, which need no download.

    python experiments/ablations.py                         all four tables, three seeds, some minutes on a CPU
    python experiments/ablations.py --tables 6 --seeds 5    one table, with more seeds
    python experiments/ablations.py --config recipes/cifar10.yaml --data-dir DATA --dataset-download --workers 4
                                                            the paper's setting; days on one GPU

    6   which of radii and coordinates are trained
    7   the standard deviation of the points' initial positions
    8   the initial radius: the paper's 4 / k and 1.5, 2 and 2.5 times that
    9   the number of points

A table varies one parameter; all others come from --config. Options that are not listed below are those of train.py,
which trains each setting once per seed. The folders of the runs stay under --runs. The same command skips finished runs
and resumes the one that was stopped.

The score is top-1 on the validation images after the last epoch. The best of all epochs, chosen by the same images,
would be too high by their fluctuation. The paper's results are of the best epoch.

Writes ablations.csv, with a row for each table, setting and seed; ablations.md, with means and standard deviations over
the seeds beside the paper's results; and ablations.png. All are in OUTPUT.

Exit codes: 0 done, 1 a run failed, 2 wrong arguments or a folder that cannot be written; stopped: 130 by Ctrl-C, 143 by
SIGTERM, 138 by SIGUSR1.
"""
import argparse
import logging
import os
import shlex
import signal
import sys
from itertools import combinations
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

if __name__ == '__main__':  # Ctrl-C while PyTorch loads: no traceback
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b'ablations.py: interrupted\n'), os._exit(130)))

# Threads that spin while they wait made a step ten times slower beside other work on the same two cores.
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

import tables
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

import smpconv_models  # noqa: F401 (registers the models with timm)
from smpconv_models.training import (
    TrainingInterrupted,
    TrainOptions,
    atomic_write,
    build_trainer,
    cli,
    describe_error,
)
from smpconv_models.utils import streams

FILES = ('ablations.csv', 'ablations.md', 'ablations.png')
CONFIG = str(Path(__file__).parents[1] / 'recipes' / 'ablation_digits.yaml')
PAPER_KERNEL = 33

Kwargs = Dict[str, Any]


class Setting(NamedTuple):
    """Column of one of the paper's tables.

    Attributes:
        name: Name in the table.
        varied: Arguments that differ from ``BASE``; ``radius_factor`` multiplies the base's radius.
        paper_top1: Top-1 in the paper, on CIFAR10.
        paper_parameters: Number of parameters in the paper, if the table has it.
    """
    name: str
    varied: Kwargs
    paper_top1: float
    paper_parameters: str = ''


# Base of all tables: the paper's SMPConv.
BASE: Kwargs = {'learned': ['coords', 'radius'], 'coords_std': 0.05, 'radius_factor': 1., 'num_points': 16}

TITLES = {6: 'what is trained', 7: 'spread of the initial positions', 8: 'initial radius', 9: 'number of points'}

SETTINGS: Dict[int, Tuple[Setting, ...]] = {
    6: (
        Setting('A: neither', {'learned': []}, 90.92),
        Setting('B: radius', {'learned': ['radius']}, 91.35),
        Setting('C: coordinates', {'learned': ['coords']}, 92.47),
        Setting('SMPConv: both', {}, 93.00),
    ),
    7: tuple(
        Setting(f'std {std}', {'coords_std': std}, top1)
        for std, top1 in ((0.05, 93.00), (0.2, 92.24), (0.3, 91.84), (0.5, 91.51))),
    8: tuple(
        Setting(f'{factor:g} x 4/k', {'radius_factor': factor}, top1)
        for factor, top1 in ((1., 93.00), (1.5, 92.36), (2., 92.06), (2.5, 91.76))),
    9: tuple(
        Setting(f'{points} points', {'num_points': points}, top1, parameters)
        for points, top1, parameters in (
            (4, 92.56, '250k'), (8, 92.28, '330k'), (16, 93.00, '490k'), (32, 92.84, '809k'), (64, 92.21, '1447k'))),
}


# --- runs ---


def model_kwargs(varied: Kwargs, kernel_size: int) -> Kwargs:
    """Return all arguments that a setting gives to the model's constructor, so that equal settings compare equal.

    The radius is rounded like the paper's: 0.12, 0.18, 0.24 and 0.30 for kernels of 33x33.
    """
    kwargs = {**BASE, **varied}
    kwargs['init_radius'] = round(kwargs.pop('radius_factor') * round(4 / kernel_size, 2), 2)
    return kwargs


def name_of(kwargs: Kwargs) -> str:
    """Return a name for the folders of the runs with these arguments."""
    learned = '+'.join(kwargs['learned']) or 'neither'
    return f'{learned}_std{kwargs["coords_std"]}_radius{kwargs["init_radius"]}_points{kwargs["num_points"]}'


class RunFailedError(Exception):
    """A run failed for a reason outside this program."""


class Result(NamedTuple):
    """Results of one run after the last epoch."""
    top1: float
    loss: float
    best_top1: float
    parameters: int


def training_options(args: argparse.Namespace) -> TrainOptions:
    """Parse the recipe and the options that belong to ``train.py``.

    Raises:
        ValueError: If an option is wrong, or sets what the tables set.
    """
    parser = cli.Parser(prog='ablations.py', add_help=False, allow_abbrev=False)
    parser.add_argument('--config')
    cli.add_options(parser, *TrainOptions.groups().values())
    options = TrainOptions.from_args(cli.parse_args(parser, ['--config', args.config, *args.others]))
    for text in args.others:
        if text.split('=')[0] in ('--seed', '--experiment', '--model'):
            raise ValueError(
                f'{text.split("=")[0]} is set by the tables; the recipe names the model, --seeds counts from 0')
    if options.model.model != 'smpconv_cifar':
        raise ValueError(f'the tables need the model smpconv_cifar, got {options.model.model} from {args.config}')
    if fixed := {'init_radius', *BASE} & set(options.model.model_kwargs):
        raise ValueError(f'the tables set {", ".join(sorted(fixed))}: remove this from model_kwargs')
    device = options.device.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    return options.with_values('device', device=device)


def run_one(base: TrainOptions, kwargs: Kwargs, seed: int, folder: Path) -> Result:
    """Train or resume a run; a finished run is not trained."""
    experiment = f'{name_of(kwargs)}_epochs{base.run.epochs}_seed{seed}'  # other epochs are another run
    options = base.with_values('model', model_kwargs={**base.model.model_kwargs, **kwargs}).with_values(
        'data', seed=seed).with_values('run', output=str(folder), experiment=experiment)
    try:
        trainer = build_trainer(options)
    except ValueError as error:
        raise ValueError(f'{experiment}: {error} (here: --runs DIR, another folder for all runs)') from error
    try:
        done = trainer.train()
    except (ArithmeticError, MemoryError, OSError, RuntimeError, ValueError) as error:
        line = describe_error(error, trainer.world, base.data.batch_size, base.data.workers, is_training=True)
        if line is None:
            raise
        raise RunFailedError(f'{experiment}: {line}') from error
    finally:
        trainer.close()
    row = trainer.state.rows[-1]
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return Result(done['top1'], row.get('ema_loss', row['eval_loss']), done['best_top1'], parameters)


Results = Dict[Tuple[str, int], Result]


def run_all(args: argparse.Namespace, base: TrainOptions) -> Results:
    """Train each setting once per seed, also if several tables share it; return results by name and seed.

    A seed runs all settings before the next seed starts, so an interrupted series has whole tables of fewer seeds.
    """
    chosen = [setting for table in args.tables for setting in SETTINGS[table]]
    distinct = {name_of(kwargs): kwargs for kwargs in (kwargs_of(setting, base) for setting in chosen)}
    pairs = [(name, seed) for seed in range(args.seeds) for name in distinct]
    results = {}
    with tqdm(pairs, desc='runs', unit='run', disable=None) as bar:
        for name, seed in bar:
            bar.set_postfix_str(f'{name}, seed {seed}')
            results[name, seed] = run_one(base, distinct[name], seed, Path(args.runs))
    return results


def kwargs_of(setting: Setting, base: TrainOptions) -> Kwargs:
    """Return a setting's arguments of the model, for the kernel size of the recipe."""
    return model_kwargs(setting.varied, base.model.model_kwargs.get('kernel_size', PAPER_KERNEL))


# --- what is written ---


def rows_of(results: Results, args: argparse.Namespace, base: TrainOptions) -> List[Dict[str, Any]]:
    rows = []
    for table in args.tables:
        for setting in SETTINGS[table]:
            kwargs = kwargs_of(setting, base)
            for seed in range(args.seeds):
                done = results[name_of(kwargs), seed]
                rows.append({
                    'table': table, 'setting': setting.name, 'seed': seed, **done._asdict(),
                    'paper_top1': setting.paper_top1, 'paper_parameters': setting.paper_parameters,
                    **kwargs, 'learned': '+'.join(kwargs['learned']), 'epochs': base.run.epochs,
                    'dataset': base.data.dataset or base.data.data_dir, **tables.environment(str(base.device.device)),
                })
    return rows


COLUMNS = {'setting': 'setting', 'top1': 'top-1 (%)', 'loss': 'loss', 'paper_top1': 'the paper: top-1 on CIFAR10 (%)'}
COUNTS = {'parameters': 'parameters', 'paper_parameters': "the paper's parameters"}


def table_text(rows: Sequence[Dict[str, Any]], table: int) -> str:
    of_table = [row for row in rows if row['table'] == table]
    summary = tables.summarize(
        of_table, ('setting', 'paper_top1', 'paper_parameters', 'parameters', 'init_radius'), {'top1': 2, 'loss': 4})
    for row in summary:
        row.update(paper_top1=f'{row["paper_top1"]:.2f}', parameters=f'{row["parameters"]:,}')
        if table == 8:
            row['setting'] += f' = {row["init_radius"]}'
    return f'{tables.markdown(summary, {**COLUMNS, **(COUNTS if table == 9 else {})})}\n{order_text(of_table)}\n'


def order_text(rows: Sequence[Dict[str, Any]]) -> str:
    """Return a sentence on how many distinguishable pairs of settings are in the paper's order."""
    by_name: Dict[str, List[float]] = {}
    for row in rows:
        by_name.setdefault(row['setting'], []).append(row['top1'])
    ours = {name: tables.mean_std(values) for name, values in by_name.items()}
    paper = {row['setting']: row['paper_top1'] for row in rows}
    apart = [
        (first, second) for first, second in combinations(ours, 2)
        if abs(ours[first][0] - ours[second][0]) > ours[first][1] + ours[second][1]]
    alike = [pair for pair in apart if (ours[pair[0]][0] > ours[pair[1]][0]) == (paper[pair[0]] > paper[pair[1]])]
    return (
        f'Pairs of settings that differ by more than the sum of their deviations: {len(apart)}; in the order of the '
        f'paper: {len(alike)} of them.')


def command_of(args: argparse.Namespace) -> str:
    """Return the command that reproduces the numbers, without the options for output folders."""
    recipe = Path(args.config)
    recipe = Path('recipes') / recipe.name if recipe == Path(CONFIG) else recipe
    given = ['--config', str(recipe), '--tables', *map(str, args.tables), '--seeds', str(args.seeds), *args.others]
    return f'python experiments/ablations.py {shlex.join(given)}'


def report(rows: List[Dict[str, Any]], args: argparse.Namespace, base: TrainOptions) -> str:
    """Return the text of the Markdown file."""
    where, batch_size = rows[0], base.data.batch_size
    model = ', '.join(f'{key} {value}' for key, value in base.model.model_kwargs.items()) or "the paper's"
    parts = [f'## Table {table}: {TITLES[table]}\n\n{table_text(rows, table)}' for table in args.tables]
    return f"""# Trained parameters and initial points: tables 6 to 9

These are the ablations of section 4.4, here on `{where['dataset']}`. The network is smpconv_cifar
({model}), trained with {base.optimizer.opt}, a learning rate of {base.optimizer.lr:g},
batches of {batch_size} and {base.run.epochs} epochs. Top-1 and mean cross-entropy are those of the validation images
after the last epoch, as mean ± standard deviation over {args.seeds} seeds. A seed determines points, weights,
augmentation and order.

The paper's results are of CIFAR10, 210 epochs, and the best epoch on the test images. Their order can be compared with
these results, but not their height. If settings differ by less than their deviations, no conclusion is possible. Below
each table is the number of pairs that differ by more, and how many of these are in the paper's order.

Each setting differs from SMPConv in one parameter. SMPConv trains radii and coordinates; it has a standard deviation of
the initial positions of 0.05 (for kernels over [-1, 1]), an initial radius of 4/k, and 16 points. SMPConv is in each
table, trained once.

{chr(10).join(parts)}
![Top-1 of each setting, here and in the paper](ablations.png)

Each seed is a row of [ablations.csv](ablations.csv), which also has the top-1 of the best epoch. Written on
{where['date']}, {where['device']}, threads: {where['threads']}, torch {where['torch']}, by

```bash
{command_of(args)}
```
"""


def save_picture(path: Path, rows: List[Dict[str, Any]], numbers: Sequence[int], dataset: str) -> None:
    """Save a panel per table: results with deviations on the left axis, the paper's on the right."""
    height = 4.2 * ((len(numbers) + 1) // 2)
    figure = Figure(figsize=(12, height) if len(numbers) > 1 else (7, height), layout='constrained')
    panels = figure.subplots(-(-len(numbers) // 2), min(2, len(numbers)), squeeze=False).flat
    for axes, table in zip(panels, numbers):
        draw_table(axes, [row for row in rows if row['table'] == table], table, dataset)
    for axes in list(panels)[len(numbers):]:
        axes.set_axis_off()
    figure.savefig(path, dpi=100, format='png')


def draw_table(axes: Axes, rows: List[Dict[str, Any]], table: int, dataset: str) -> None:
    names = list(dict.fromkeys(row['setting'] for row in rows))
    by_name = [[row['top1'] for row in rows if row['setting'] == name] for name in names]
    means, deviations = zip(*map(tables.mean_std, by_name))
    paper = [next(row['paper_top1'] for row in rows if row['setting'] == name) for name in names]
    left, right = [x - 0.1 for x in range(len(names))], [x + 0.1 for x in range(len(names))]
    for x, values in zip(left, by_name):
        axes.plot([x] * len(values), values, '_', color='tab:blue', alpha=0.5, markersize=9)
    has_spread = len(by_name[0]) > 1
    ours = axes.errorbar(
        left, means, deviations if has_spread else None, fmt='o', color='tab:blue', capsize=4,
        label=f'here, {dataset}: mean ± deviation; each seed')
    other = axes.twinx()
    theirs, = other.plot(right, paper, 'D', color='tab:red', markerfacecolor='none', label='the paper, CIFAR10')
    axes.set(title=f'Table {table}: {TITLES[table]}', xticks=range(len(names)), xticklabels=names,
             xlim=(-0.5, len(names) - 0.5))
    axes.set_ylabel('top-1 here (%)', color='tab:blue')
    other.set_ylabel("the paper's top-1 (%)", color='tab:red')
    for side in (axes, other):
        side.margins(y=0.15)
    axes.grid(axis='y', alpha=0.25)
    axes.legend(handles=[ours, theirs], loc='upper center', bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False)


# --- the command ---


def create_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog='ablations.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument(
        '--tables', nargs='+', type=int, choices=tuple(SETTINGS), default=list(SETTINGS), metavar='N',
        help="numbers of the paper's tables (default: 6 7 8 9)")
    parser.add_argument(
        '--seeds', type=cli.positive_int, default=3, metavar='N', help='number of seeds (default: %(default)s)')
    parser.add_argument(
        '--output', default='docs', metavar='DIR', help='folder for the tables and the plot (default: %(default)s)')
    parser.add_argument(
        '--runs', default='output/ablations', metavar='DIR', help='folder for the runs (default: %(default)s)')
    parser.add_argument(
        '-c', '--config', default=CONFIG, metavar='FILE', help="recipe (default: recipes/ablation_digits.yaml's)")
    return parser


def run(args: argparse.Namespace, base: TrainOptions) -> None:
    """Train all settings, write the files and print the tables."""
    table, text, picture = (Path(args.output) / name for name in FILES)
    tables.check_writable([table, text, picture, Path(args.runs) / 'run'])
    rows = rows_of(run_all(args, base), args, base)
    with atomic_write(picture) as temporary:
        save_picture(temporary, rows, args.tables, rows[0]['dataset'])
    tables.write_text(text, report(rows, args, base))
    tables.write_csv(table, rows)
    for number in args.tables:
        print(f'table {number}: {TITLES[number]}\n{table_text(rows, number)}')
    print(f'{picture}, {text.name} and {table.name}; the runs are in {args.runs}')


def main(argv: Optional[List[str]] = None) -> int:
    logging.basicConfig(level=logging.WARNING, format='%(message)s', stream=sys.stderr)
    parser = create_parser()
    args, others = parser.parse_known_args(argv)
    args.others, args.tables = others, sorted(set(args.tables))
    stopped = f'finished runs are in {args.runs}; the same command resumes'
    try:
        run(args, training_options(args))
    except KeyboardInterrupt:
        parser.exit(130, f'{parser.prog}: interrupted; {stopped}\n')
    except TrainingInterrupted as stop:
        parser.exit(stop.exit_code, f'{parser.prog}: {stop}; {stopped}\n')
    except RunFailedError as error:
        parser.exit(1, f'{parser.prog}: error: {error}\n')
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    streams.keep_writable()
    sys.exit(main())
