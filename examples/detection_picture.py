"""Plots of detections beside the targets, by matplotlib without a display."""
from pathlib import Path
from typing import Any, Dict, Sequence, Tuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from smpconv_models.figures import drawable

Boxes = Dict[str, Any]


def save_detections(
        path: Path, samples: Sequence[Tuple[Tensor, Boxes, Boxes]], names: Sequence[str], threshold: float = 0.5,
        columns: int = 4) -> None:
    """Save a PNG of images with their boxes: the targets on the left of each, the detections on the right.

    Args:
        path: Path of the file to write.
        samples: Images ``(3, H, W)`` in [0, 1], targets and detections.
        names: Names of the classes by label, the background first.
        threshold: Minimum score of the detections to show.
        columns: Number of images per row.
    """
    rows = -(-len(samples) // columns)
    figure = Figure(figsize=(4.4 * columns, 2.3 * rows), layout='constrained')
    grid = figure.subplots(rows, 2 * columns, squeeze=False)
    for axes in grid.flat:
        axes.axis('off')
    for (image, target, detected), truth, right in zip(samples, grid[:, ::2].flat, grid[:, 1::2].flat):
        shown = detected['scores'] >= threshold
        _draw(truth, image, target['boxes'], [names[label] for label in target['labels']], 'lime')
        _draw(right, image, detected['boxes'][shown], [
            f'{names[label]} {score:.2f}'
            for label, score in zip(detected['labels'][shown], detected['scores'][shown].tolist())], 'yellow')
        truth.set_title('truth', fontsize=8)
        right.set_title('detected', fontsize=8)
    figure.savefig(path, dpi=110, format='png')


def _draw(axes: Axes, image: Tensor, boxes: Tensor, texts: Sequence[str], color: str) -> None:
    texts, style = drawable(texts)
    axes.imshow(image.permute(1, 2, 0).numpy())
    for (left, top, right, bottom), text in zip((boxes - 0.5).tolist(), texts):  # centers of pixels are integers
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=color, linewidth=1))
        axes.text(left, top, text, fontsize=6, color='black', va='bottom',
                  bbox=dict(facecolor=color, edgecolor='none', pad=0.5), **style)
