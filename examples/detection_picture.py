"""Pictures of detections beside what is there. Needs matplotlib; draws off screen."""
from pathlib import Path
from typing import Any, Dict, Sequence, Tuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

Boxes = Dict[str, Any]


def save_detections(
        path: Path, samples: Sequence[Tuple[Tensor, Boxes, Boxes]], names: Sequence[str], threshold: float = 0.5,
        columns: int = 4) -> None:
    """A PNG of images with their boxes: the truth on the left, what was detected on the right of each.

    Args:
        path: Where to.
        samples: Images ``(3, H, W)`` in [0, 1], targets and detections.
        names: Of the classes by label, that of the background first.
        threshold: Least score of the detections that are shown.
        columns: Images in a row.
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
    axes.imshow(image.permute(1, 2, 0).numpy())
    for (left, top, right, bottom), text in zip((boxes - 0.5).tolist(), texts):  # pixels' centres are whole numbers
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=color, linewidth=1))
        axes.text(left, top, text, fontsize=6, color='black', va='bottom', parse_math=False,
                  bbox=dict(facecolor=color, edgecolor='none', pad=0.5))
