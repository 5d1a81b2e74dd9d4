"""Moving pictures of points: how they go, weigh and reach over the checkpoints of a training run."""
from dataclasses import replace
from pathlib import Path
from typing import Any, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from smpconv_models.layers import SMPLayer

from .kernels import choose_span, draw_rows, figure_size, limits_of, name_columns, views_of
from .views import View, view_of

Layers = Mapping[str, SMPLayer]
Views = Mapping[str, View]
# Pillow's formats by how a file's name ends.
FORMATS = {'.gif': 'GIF', '.png': 'PNG', '.apng': 'PNG'}
_LAST_SECONDS = 2.


class _Scale(NamedTuple):
    """What the darkest colours of a layer's points and of its kernels mean, in all frames."""
    weight: float
    kernels: List[float]


def save_animation(
        path: Union[str, Path],
        snapshots: Sequence[Tuple[str, Layers]],
        columns: int = 5,
        fps: float = 5.,
        format: Optional[str] = None,
        filter: int = 0,
) -> None:
    """An animated GIF or PNG with a frame for each snapshot: layers' points with their reaches, and kernels.

    A row is a layer or a filter, as in :func:`save_kernels`; a kernel's colours mean the same in all frames, and of
    long kernels over time all show the same stretch. The last one stays longer.

    Args:
        path: Where to.
        snapshots: Titles with layers by name, in order: the same layers in each, such as those of
            :func:`choose_layers`.
        columns: Kernels shown of each layer.
        fps: Frames in a second.
        format: 'GIF' or 'PNG', else by how the path ends: .gif, .png, .apng.
        filter: Number of the filter, in layers whose filters have points of their own.

    Raises:
        ValueError: Fewer than two snapshots, snapshots of different layers, another format or rate; no such filter.
    """
    format = format or FORMATS.get(Path(path).suffix.lower())
    if format not in FORMATS.values():
        raise ValueError(f'an animation is a file that ends in one of {tuple(FORMATS)}, got {path}')
    if not 0.1 <= fps <= 50:  # a GIF counts 16 bits of 10 ms
        raise ValueError(f'fps must lie in [0.1, 50], got {fps}')
    _check(snapshots)
    first = views_of(snapshots[0][1], filter)
    columns = min(columns, max(len(view.weights) for view in first.values()))
    spans = {name: choose_span([view_of(layers[name], filter) for _, layers in snapshots]) for name in first}
    scales = {name: _scale([layers[name] for _, layers in snapshots], filter, spans[name], columns) for name in spans}
    frames = []
    for title, layers in tqdm(snapshots, desc='drawing', unit='frame', leave=False, disable=None):
        views = {name: replace(view, span=spans[name]) for name, view in views_of(layers, filter).items()}
        frames.append(_rendered(draw_frame(title, views, scales, columns)))
    durations = [round(1000 / fps)] * (len(frames) - 1) + [round(1000 * max(_LAST_SECONDS, 1 / fps))]
    frames[0].save(path, format=format, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def _check(snapshots: Sequence[Tuple[str, Layers]]) -> None:
    if len(snapshots) < 2:
        raise ValueError(f'an animation needs at least 2 checkpoints, got {len(snapshots)}')
    first_title, first = snapshots[0]
    for title, layers in snapshots:
        if not layers or _described(layers) != _described(first):
            raise ValueError(
                f'the layers must be the same in all snapshots: {first_title} has {_described(first)}, {title} has '
                f'{_described(layers)}')


def _described(layers: Layers) -> List[str]:
    views = {name: view_of(layer) for name, layer in layers.items()}
    return [f'{name} ({len(view.weights)}, {view})' for name, view in views.items()]


def _scale(layers: Sequence[SMPLayer], filter: int, span: Optional[Tuple[int, int]], columns: int) -> _Scale:
    heaviest, limits = 0., []
    for layer in layers:  # one at a time, as their kernels take memory
        view = replace(view_of(layer, filter), span=span)
        heaviest = max(heaviest, float(view.point_weights.max()))
        limits.append(limits_of(view, columns))
    return _Scale(heaviest, np.max(limits, 0).tolist())


def draw_frame(title: str, views: Views, scales: Mapping[str, _Scale], columns: int) -> Figure:
    """The figure of one frame."""
    figure = Figure(figsize=figure_size(views.values(), 1 + columns, 0.4), layout='constrained')
    figure.suptitle(title, fontsize=10, parse_math=False)
    grid = draw_rows(figure, views, columns, scales)
    first = next(iter(views.values()))
    if first.filter is not None:
        name_columns(grid, first)
    return figure


def _rendered(figure: Figure) -> Any:
    figure.set_dpi(100)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert('RGB')
