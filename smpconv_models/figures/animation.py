"""Animations of points: their positions, weights and radii over the checkpoints of a training run."""
from dataclasses import replace
from pathlib import Path
from typing import List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from smpconv_models.layers import SMPLayer

from .kernels import KernelView, draw_rows, figure_size, kernel_view, kernel_views, value_limit, visible_range

Layers = Mapping[str, SMPLayer]
# Pillow's formats by file extension.
FORMATS = {'.gif': 'GIF', '.png': 'PNG', '.apng': 'PNG'}
_LAST_FRAME_S = 2.


class _Scale(NamedTuple):
    """Largest weight of a layer's points, and limits of its kernels, over all frames."""
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
    """Save an animated GIF or PNG with a frame per snapshot: layers' points with their supports, and kernels.

    A row is a layer or a filter, as in :func:`save_kernels`. A kernel has the same color scale in all frames,
    and all frames show the same range of a long 1-D kernel. The last frame stays for at least two seconds.

    Args:
        path: Path of the file to write.
        snapshots: Titles and layers by name, in order, with the same layers in each, such as those of
            :func:`choose_layers`.
        columns: Number of kernels per layer.
        fps: Frames per second.
        format: 'GIF' or 'PNG'; by default chosen by the extension of the path: .gif, .png, .apng.
        filter: Index of the filter, for layers with points per filter.

    Raises:
        ValueError: If there are fewer than two snapshots, their layers differ, the format or the frame rate is not
            supported, or a layer has no such filter.
    """
    format = format or FORMATS.get(Path(path).suffix.lower())
    if format not in FORMATS.values():
        raise ValueError(f'the extension of an animation must be one of {tuple(FORMATS)}, got {path}')
    if not 0.1 <= fps <= 50:  # a GIF counts 16 bits of 10 ms
        raise ValueError(f'fps must lie in [0.1, 50], got {fps}')
    _check_same_layers(snapshots)
    first = kernel_views(snapshots[0][1], filter)
    columns = min(columns, max(len(view.weights) for view in first.values()))
    spans, scales = {}, {}
    for name, view in first.items():
        layers = [snapshot[name] for _, snapshot in snapshots]
        spans[name] = visible_range([kernel_view(layer, filter) for layer in layers]) if view.ndim == 1 else None
        scales[name] = _scale(layers, filter, spans[name], columns)
    frames = []
    for title, snapshot in tqdm(snapshots, desc='drawing', unit='frame', leave=False, disable=None):
        views = {name: replace(view, span=spans[name]) for name, view in kernel_views(snapshot, filter).items()}
        figure = draw_frame(title, views, scales, columns)
        figure.set_dpi(100)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert('RGB'))
    durations = [round(1000 / fps)] * (len(frames) - 1) + [round(1000 * max(_LAST_FRAME_S, 1 / fps))]
    frames[0].save(path, format=format, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def draw_frame(title: str, views: Mapping[str, KernelView], scales: Mapping[str, _Scale], columns: int) -> Figure:
    """Return the figure of one frame."""
    figure = Figure(figsize=figure_size(views.values(), 1 + columns, 0.4), layout='constrained')
    figure.suptitle(title, fontsize=10, parse_math=False)
    draw_rows(figure, views, columns, scales, with_titles=next(iter(views.values())).filter is not None)
    return figure


def _check_same_layers(snapshots: Sequence[Tuple[str, Layers]]) -> None:
    if len(snapshots) < 2:
        raise ValueError(f'an animation needs at least 2 checkpoints, got {len(snapshots)}')
    described = [
        [f'{name} ({len(view.weights)}, {view})' for name, view in kernel_views(layers).items()]
        for _, layers in snapshots]
    for (title, _), found in zip(snapshots, described):
        if not found or found != described[0]:
            raise ValueError(
                f'the layers must be the same in all snapshots: {snapshots[0][0]} has {described[0]}, {title} has '
                f'{found}')


def _scale(layers: Sequence[SMPLayer], filter: int, span: Optional[Tuple[int, int]], columns: int) -> _Scale:
    heaviest, limits = 0., []
    for layer in layers:  # one at a time, as their kernels take memory
        view = replace(kernel_view(layer, filter), span=span)
        heaviest = max(heaviest, float(view.point_weights.max()))
        limits.append([
            value_limit(view, channel, with_points=view.ndim == 1)
            for channel in range(min(columns, len(view.weights)))])
    return _Scale(heaviest, np.max(limits, 0).tolist())
