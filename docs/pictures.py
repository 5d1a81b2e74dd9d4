"""Draw the pictures of README.md, for light and for dark pages, and the diagrams of docs/.

    python docs/pictures.py hero --checkpoint output/digits       points, sampled kernels, and the receptive field
    python docs/pictures.py speed                                 the last rows of one machine in benchmarks/results
    python docs/pictures.py networks                              public networks, from benchmarks/results too
    python docs/pictures.py fields --runs RUN ...                 receptive fields of several runs on the digits
    python docs/pictures.py block                                 the block of SMPConv-T
    python docs/pictures.py layers                                the parts of the package, and who imports whom

hero, speed and networks write docs/NAME.png and docs/NAME-dark.png, both transparent; the others docs/NAME.png.
"""
import argparse
import copy
import itertools
import json
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

import smpconv_models  # noqa: F401 (registers the models)
from smpconv_models import figures
from smpconv_models.layers import smp_layers
from smpconv_models.prediction.inputs import ModelSource, Preparation
from smpconv_models.training import Digits
from smpconv_models.utils.errors import unreadable_file

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / 'benchmarks' / 'results' / 'depthwise.jsonl'
ACCELERATION = RESULTS.with_name('acceleration.jsonl')
DEVICE = 'x86_64 AVX512, 2 cores'
INK, DARK_INK = '#1f2328', '#e6edf3'  # on light and on dark pages
BLUE, ORANGE, GRAY = '#2f6fb7', '#d97706', '#8b949e'
NETWORKS = {
    'smpconv_t': 'SMPConv-T', 'smpconv_b': 'SMPConv-B', 'smpconv_mobile51': 'mobile51', 'convnext_tiny': 'ConvNeXt-T'}
LAYOUTS = {'nchw': ('NCHW', BLUE), 'nhwc': ('channels_last', ORANGE)}
FIELD_COLORS = LinearSegmentedColormap.from_list('field', ['#ffffff', ORANGE, '#7c2d12'])


def save_both(figure: Figure, name: str) -> None:
    """Save a transparent figure for light pages, and for dark ones."""
    save(figure, name, facecolor='none')
    for artist in figure.findobj(lambda artist: getattr(artist, 'has_ink', False)):
        artist.set_color(DARK_INK)
    save(figure, f'{name}-dark', facecolor='none')


def save(figure: Figure, name: str, **options: Any) -> None:
    path = FOLDER / f'{name}.png'
    figure.savefig(path, dpi=200, **options)
    print(f'picture: {path}')


def inked(artist: Any) -> Any:
    """Mark an artist whose color follows the page."""
    artist.has_ink = True
    return artist


def bare(axes: Axes, title: str) -> None:
    """Leave a panel with its title alone."""
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_color(GRAY)
    inked(axes.set_title(title, fontsize=14, color=INK))


# --- hero ---


def draw_hero(path: str) -> None:
    """Draw the points of a layer, its kernel on two grids, and the receptive field of the network."""
    loaded, = ModelSource(checkpoints=[path]).load()
    model = loaded.model
    layer = next(iter(smp_layers(model).values()))
    fine = copy.deepcopy(layer)
    fine.resize(31)
    figure = Figure(figsize=(12, 3.7), layout='constrained')
    points, kernel, field = figure.subplots(1, 3)
    figures.draw_points(points, layer)
    bare(points, f'{layer.coords.shape[0]} points with their radii')
    figures.draw_kernel(kernel, fine, 0, with_points=False)
    bare(kernel, '→  a sampled 31×31 kernel')
    images = torch.stack([torch.nn.functional.interpolate(
        torch.as_tensor(_pixels(index))[None, None], size=(128, 128), mode='bicubic')[0] for index in range(30)])
    contributions = figures.log_scaled(figures.effective_receptive_field(model, images))
    field.imshow(contributions, cmap=FIELD_COLORS)
    bare(field, '→  what one output sees of 128×128')
    save_both(figure, 'hero')


def _pixels(index: int) -> np.ndarray:
    image, _ = Digits('validation', 'L')[index]
    return (np.asarray(image, np.float32) / 255 - 0.5) / 0.5


# --- speed ---


def draw_speed() -> None:
    """Draw how many times as fast a training step of the operation is as F.conv2d's, by network and layout."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    rows = [row for row in rows if row['dtype'] == 'float32' and row['device'] == DEVICE]
    latest = {row['case']: row for row in rows if row['network'] in NETWORKS}
    figure = Figure(figsize=(9, 3.4), layout='constrained')
    axes = figure.subplots(subplot_kw={'facecolor': 'none'})
    for offset, (layout, (label, color)) in zip((-0.19, 0.19), LAYOUTS.items()):
        factors = [_speed_up(list(latest.values()), network, layout) for network in NETWORKS]
        bars = axes.bar([index + offset for index in range(len(factors))], factors, 0.36, color=color, label=label)
        for text in axes.bar_label(bars, [f'{factor:.1f}×' for factor in factors], fontsize=12, padding=2):
            inked(text)
    inked(axes.axhline(1, color=INK, linewidth=1))
    axes.set_xticks(range(len(NETWORKS)), list(NETWORKS.values()), fontsize=13)
    axes.set_yticks([])
    axes.set_ylim(0, 33)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for text in (*axes.get_xticklabels(), axes.set_title(
            'Forward and gradients of the large kernels, AVX-512: times as fast as F.conv2d (line)', fontsize=13)):
        inked(text).set_color(INK)
    for text in axes.legend(fontsize=12, frameon=False, loc='upper right').get_texts():
        inked(text)
    save_both(figure, 'speed')


def _speed_up(rows: List[Dict[str, Any]], network: str, layout: str) -> float:
    plain, fast = (
        sum(row['times'] * row['seconds'][f'{path}/{layout}']['all'] for row in rows if row['network'] == network)
        for path in ('plain', 'auto'))
    return plain / fast


# --- networks ---


def draw_networks() -> None:
    """Draw how many times as fast public networks are with the operation, by layout, of the last rows."""
    rows = {row['network']: row for row in map(json.loads, ACCELERATION.read_text().splitlines())}
    names = list(rows)[::-1]
    figure = Figure(figsize=(9, 1.6 + 0.27 * len(names)), layout='constrained')
    panels = figure.subplots(1, len(LAYOUTS), sharex=True, sharey=True, subplot_kw={'facecolor': 'none'})
    for axes, (layout, (title, _)) in zip(panels, LAYOUTS.items()):
        for mode, color in (('training', BLUE), ('inference', ORANGE)):
            for size, face, offset in (('7', color, 0.15), ('3', 'none', -0.15)):
                points = [
                    (_acceleration(rows[name], layout, mode, size), y + offset) for y, name in enumerate(names)
                    if layout in rows[name]['seconds'] and rows[name]['min_kernel_size'][size]['replaced']]
                axes.scatter(
                    *zip(*points), s=42, facecolors=face, edgecolors=color, zorder=3,
                    label=f'{mode}, kernels from {size}')
        inked(axes.axvline(1, color=INK, linewidth=1))
        axes.set_xscale('log')
        axes.xaxis.set_major_formatter('{x:g}×')
        axes.xaxis.set_minor_formatter('{x:g}×')
        axes.grid(axis='y', color=GRAY, alpha=0.3)
        axes.tick_params(which='both', labelsize=12, length=0)
        axes.set_yticks(range(len(names)), names)
        for spine in axes.spines.values():
            spine.set_visible(False)
        texts = (*axes.get_xticklabels(which='both'), *axes.get_yticklabels(), axes.set_title(title, fontsize=13))
        for text in texts:
            inked(text).set_color(INK)
    handles, labels = panels[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc='outside lower center', ncols=2, fontsize=12, frameon=False)
    for text in legend.get_texts():
        inked(text).set_color(INK)
    save_both(figure, 'networks')


def _acceleration(row: Dict[str, Any], layout: str, mode: str, size: str) -> float:
    seconds = row['seconds'][layout][mode]
    return seconds['before'] / seconds[row['min_kernel_size'][size]['copy']]


# --- receptive fields ---


def draw_fields(runs: List[str]) -> None:
    """Draw the receptive fields of the networks of some runs on the digits, with one scale for all.

    Raises:
        ValueError: If a folder has no summary or no network that can be read.
    """
    figure = Figure(figsize=(12, 4.5), layout='compressed')
    grid = figure.subplots(1, len(runs), squeeze=False)[0]
    for axes, run in zip(grid, runs):
        summary = _summary(Path(run) / 'summary.json')
        name, parameters, top1 = (summary[key] for key in ('model', 'parameters', 'best_top1'))
        loaded, = ModelSource(checkpoints=[run]).load()
        preparation, digits = Preparation.of(loaded, 128), Digits('validation', 'L')
        images = torch.stack([preparation.transform(digits[index][0]) for index in range(0, len(digits), 7)])
        field = figures.effective_receptive_field(loaded.model, images)
        picture = axes.imshow(np.maximum(field / field.max(), 1e-4), cmap=FIELD_COLORS, norm=LogNorm(1e-4, 1))
        x, y, side = _smallest_square(field, 0.5)
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), side, side, fill=False, edgecolor=BLUE, linewidth=2.5))
        bare(axes, f'{name}\n{parameters / 1e6:.2f} M parameters, top-1 {top1:.1f} %')
        axes.set_xlabel(f'half within {side}×{side} pixels', fontsize=14, color=BLUE)
        central = [figures.central_square(field, share) for share in (0.5, 0.99)]
        print(
            f'{name}: {parameters:,} parameters, top-1 {top1:.2f} %, half within {side}x{side}; '
            f'central squares of 50 and 99 %: {central[0]}, {central[1]}')
    bar = figure.colorbar(picture, ax=grid, shrink=0.8, fraction=0.03, pad=0.01)
    bar.set_label('contribution over the largest', fontsize=13)
    bar.ax.tick_params(labelsize=12)
    save(figure, 'fields')


def _summary(path: Path) -> Dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise unreadable_file(path, error) from error


def _smallest_square(field: np.ndarray, share: float) -> Tuple[int, int, int]:
    """Return the corner (x, y) and the side of the smallest square at any place that holds a share of a square map.

    A central square would be too large for networks with patches, whose fields lie off the middle.
    """
    sums = np.pad(field.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    for side in range(1, len(field)):
        held = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
        if held.max() >= share * field.sum():
            y, x = np.unravel_index(held.argmax(), held.shape)
            return int(x), int(y), side
    return 0, 0, len(field)


# --- diagrams ---


def _box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str, size: float = 12) -> None:
    axes.add_patch(FancyBboxPatch(
        (x, y), width, height, boxstyle='round,pad=0,rounding_size=0.12', facecolor=color, edgecolor='none'))
    axes.text(x + width / 2, y + height / 2, text, ha='center', va='center', color='white', fontsize=size)


def _arrow(axes: Axes, *corners: Tuple[float, float]) -> None:
    """Draw an arrow along a path of straight lines."""
    for start, end in itertools.pairwise(corners):
        style = '-|>' if end is corners[-1] else '-'
        axes.add_patch(FancyArrowPatch(
            start, end, arrowstyle=style, mutation_scale=14, color=INK, linewidth=1.4, shrinkA=0, shrinkB=0,
            capstyle='projecting'))


def _canvas(width: float, height: float) -> Tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis('off')
    return figure, axes


def draw_block() -> None:
    """Draw a large-kernel block and its feed-forward block, as in layers/blocks.py."""
    figure, axes = _canvas(12.2, 3.2)
    middle, x = 1.55, 0.8
    for title, residual in (
            ('large-kernel block', [
                ('batch\nnorm', GRAY), ('1×1\nReLU', BLUE), ('depthwise 31×31\nfrom points', ORANGE),
                ('ReLU\n1×1', BLUE)]),
            ('feed-forward block', [('batch\nnorm', GRAY), ('1×1, ×4\nGELU', BLUE), ('1×1', BLUE)])):
        start = x - 0.45
        for text, color in residual:
            width = 1.75 if color == ORANGE else 0.95
            _arrow(axes, (x - (0.45 if x > 1 else 0.7), middle), (x, middle))
            _box(axes, x, middle - 0.45, width, 0.9, text, color, 13)
            if color == ORANGE:
                _box(axes, x, 0.2, width, 0.6, 'depthwise 5×5', ORANGE, 13)
                _arrow(axes, (x - 0.22, middle), (x - 0.22, 0.5), (x, 0.5))
                _arrow(axes, (x + width, 0.5), (x + width + 0.16, 0.5), (x + width + 0.16, middle - 0.02))
            x += width + 0.45
        _arrow(axes, (x - 0.45, middle), (x - 0.17, middle))
        axes.text(x, middle - 0.02, '⊕', ha='center', va='center', color=INK, fontsize=22)
        _arrow(axes, (start, middle), (start, 2.55), (x, 2.55), (x, middle + 0.16))
        axes.text((start + x) / 2, 2.82, title, ha='center', va='center', color=INK, fontsize=14)
        x += 0.62
    _arrow(axes, (x - 0.46, middle), (x - 0.1, middle))
    save(figure, 'block')


def draw_layers() -> None:
    """Draw the parts of the package, as the test of imports holds them: a part imports those below."""
    figure, axes = _canvas(10, 4.6)
    rows = [
        (BLUE, ['train.py   validate.py   predict   demo   hub/   examples/   experiments/   benchmarks/']),
        ('#5b7fa6', ['training', 'prediction', 'figures', 'hub']),
        (ORANGE, ['models', 'detection', 'data']),
        (ORANGE, ['layers']),
        ('#b45309', ['ops:  CPU   Triton   reference   conv2d']),
        (GRAY, ['checkpoint', 'utils']),
    ]
    height = 0.58
    for index, (color, names) in enumerate(rows):
        y = 4.6 - (index + 1) * (height + 0.17)
        width = (9.6 - 0.2 * (len(names) - 1)) / len(names)
        for column, name in enumerate(names):
            _box(axes, 0.2 + column * (width + 0.2), y, width, height, name, color, 13)
    save(figure, 'layers')


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    hero = commands.add_parser('hero')
    hero.add_argument('--checkpoint', default='output/digits', help="run's folder of make train (default: %(default)s)")
    fields = commands.add_parser('fields')
    fields.add_argument(
        '--runs', nargs='+', default=['output/digits', 'output/resnet', 'output/convnext'],
        help='folders of runs on the digits (default: %(default)s)')
    for name in ('speed', 'networks', 'block', 'layers'):
        commands.add_parser(name)
    args = parser.parse_args(argv)
    try:
        if args.command == 'hero':
            draw_hero(args.checkpoint)
        elif args.command == 'fields':
            draw_fields(args.runs)
        else:
            {'speed': draw_speed, 'networks': draw_networks, 'block': draw_block, 'layers': draw_layers}[args.command]()
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == '__main__':
    sys.exit(main())
