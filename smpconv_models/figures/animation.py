"""Moving pictures of points: how they go, weigh and reach over the checkpoints of a training run."""
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from smpconv_models.layers import SMPDepthwiseConv2d

from .kernels import draw_kernel, draw_points, point_weights, short_name

Layers = Mapping[str, SMPDepthwiseConv2d]
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
) -> None:
    """An animated GIF or PNG with a frame for each snapshot: layers' points with their reaches, and kernels.

    A row is a layer, as in :func:`save_kernels`; a kernel's colours mean the same in all frames. The last one stays
    longer.

    Args:
        path: Where to.
        snapshots: Titles with layers by name, in order: the same layers in each, such as those of
            :func:`choose_layers`.
        columns: Kernels shown of each layer.
        fps: Frames in a second.
        format: 'GIF' or 'PNG', else by how the path ends: .gif, .png, .apng.

    Raises:
        ValueError: Fewer than two snapshots, snapshots of different layers, another format or rate.
    """
    format = format or FORMATS.get(Path(path).suffix.lower())
    if format not in FORMATS.values():
        raise ValueError(f'an animation is a file that ends in one of {tuple(FORMATS)}, got {path}')
    if not 0.1 <= fps <= 50:  # a GIF counts 16 bits of 10 ms
        raise ValueError(f'fps must lie in [0.1, 50], got {fps}')
    _check(snapshots)
    columns = min(columns, max(layer.channels for layer in snapshots[0][1].values()))
    scales = {name: _scale([layers[name] for _, layers in snapshots], columns) for name in snapshots[0][1]}
    frames = []
    for title, layers in tqdm(snapshots, desc='drawing', unit='frame', leave=False, disable=None):
        frames.append(_rendered(draw_frame(title, layers, scales, columns)))
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
    return [f'{name} ({layer.channels}, {layer.kernel_size}x{layer.kernel_size})' for name, layer in layers.items()]


def _scale(layers: Sequence[SMPDepthwiseConv2d], columns: int) -> _Scale:
    kernels = torch.stack([layer.kernel()[:columns].detach().abs().amax((1, 2, 3)) for layer in layers])
    return _Scale(max(float(point_weights(layer).max()) for layer in layers), kernels.amax(0).tolist())


def draw_frame(title: str, layers: Layers, scales: Dict[str, _Scale], columns: int) -> Figure:
    """The figure of one frame."""
    figure = Figure(figsize=(1.4 * (1 + columns) + 0.5, 1.45 * len(layers) + 0.4), layout='constrained')
    figure.suptitle(title, fontsize=10, parse_math=False)
    grid = figure.subplots(len(layers), 1 + columns, squeeze=False)
    for row, (name, layer) in zip(grid, layers.items()):
        draw_points(row[0], layer, heaviest=scales[name].weight)
        row[0].set_ylabel(short_name(name, layer), fontsize=7)
        for channel, axes in enumerate(row[1:]):
            if channel < layer.channels:
                draw_kernel(axes, layer, channel, with_points=False, limit=scales[name].kernels[channel])
            else:
                axes.axis('off')
    return figure


def _rendered(figure: Figure) -> Any:
    figure.set_dpi(100)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert('RGB')
