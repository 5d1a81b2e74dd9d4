"""Grad-CAM and its variants: the regions of an image that support a class, by the grad-cam package."""
from pathlib import Path
from typing import Any, List, Optional, Sequence, Union

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor, nn

from ._text import drawable
from .kernels import check_layer_name
from .receptive_field import check_inputs, forward_or_raise

# Methods of pytorch_grad_cam that need no more than a layer's activations and gradients.
METHODS = ('GradCAM', 'GradCAMPlusPlus', 'XGradCAM', 'HiResCAM', 'LayerCAM', 'EigenGradCAM')


def heat_maps(
        model: nn.Module, images: Tensor, layer: Optional[str] = None, classes: Optional[Sequence[int]] = None,
        method: str = 'GradCAM') -> np.ndarray:
    """Return heat maps of the regions whose features in a layer support a class, by the grad-cam package.

    Each map is resized to its image and scaled to [0, 1], so maps of different images are not comparable. A map of
    zeros means that no region supports the class.

    Args:
        model: Classifier in evaluation mode; the gradients of its parameters are cleared.
        images: Inputs of the model, ``(N, C, H, W)``.
        layer: Name of a module with output ``(N, C', H', W')``; by default the last stage.
        classes: Class of each image; by default the predicted classes.
        method: One of :data:`METHODS`.

    Returns:
        Maps of shape ``(N, H, W)``, float32 in [0, 1].

    Raises:
        ImportError: If the package is not installed.
        ValueError: If the layer, a class or the method does not exist; if the model is in training mode, cannot take
            the images or has no finite logits ``(N, classes)``.
    """
    if method not in METHODS:
        raise ValueError(f'method must be one of {METHODS}, got {method!r}')
    logits = predict(model, images)
    targets = None if classes is None else _targets(classes, *logits.shape)
    if layer is None:
        info = getattr(model, 'feature_info', None)
        if not isinstance(info, list) or not info:
            raise ValueError('the model has no named stages: name a layer')
        layer = str(info[-1]['module'])
    modules = dict(model.named_modules())
    check_layer_name(layer, [name for name in modules if name])
    cam = getattr(_import_grad_cam(), method)(model=model, target_layers=[modules[layer]])
    try:
        # images that require gradients: a frozen network alone would have none
        maps = cam(input_tensor=images.detach().clone().requires_grad_(), targets=targets)
    except (IndexError, TypeError, ValueError, np.exceptions.AxisError) as error:
        raise ValueError(f'{layer} has no feature maps of shape (N, C, H, W) that the logits depend on') from error
    finally:
        cam.activations_and_grads.release()
        model.zero_grad()
    return np.asarray(maps, dtype=np.float32).clip(0, 1)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Return finite logits ``(N, classes)`` of images.

    Raises:
        ValueError: If the model is in training mode, cannot take the images, or has another or no finite output.
    """
    check_inputs(model, images)
    logits = forward_or_raise(model, images)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] == 0:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f'expected a classifier with logits of shape (N, classes), got {got}')
    if not logits.isfinite().all():
        raise ValueError('the logits are not finite')
    return logits


def save_heat_maps(
        path: Union[str, Path], images: Tensor, maps: np.ndarray, titles: Sequence[str], columns: int = 4) -> None:
    """Save a PNG of images, each beside a copy under its heat map.

    Args:
        path: Path of the file to write.
        images: Pixels, ``(N, 1 or 3, H, W)`` in [0, 1].
        maps: Heat maps of :func:`heat_maps`, ``(N, H, W)``.
        titles: Title of each image.
        columns: Number of pairs per row.

    Raises:
        ValueError: If the numbers of images, maps and titles differ, or the sizes of images and maps.
    """
    if not len(images) == len(maps) == len(titles) or images.shape[-2:] != maps.shape[-2:]:
        raise ValueError(
            f'expected as many images as maps and titles, of one size, got {tuple(images.shape)}, {maps.shape} and '
            f'{len(titles)}')
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(3.2 * columns, 1.85 * rows), layout='constrained')
    parts: Any = figure.subfigures(rows, columns, squeeze=False).ravel()
    titles, style = drawable(titles)
    for part, image, heat, title in zip(parts, images, maps, titles):
        part.suptitle(title, fontsize=9, **style)
        pixels = image.detach().cpu().permute(1, 2, 0).clamp(0, 1).numpy()
        plain, overlaid = part.subplots(1, 2)
        plain.imshow(pixels, cmap='gray', vmin=0, vmax=1)
        overlaid.imshow(overlay_heat_map(pixels.mean(2), heat))
        for axes in (plain, overlaid):
            axes.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=130, format='png')


def overlay_heat_map(gray: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Return a gray image ``(H, W)`` in [0, 1] under its heat map ``(H, W)``: RGB in [0, 1], ``(H, W, 3)``."""
    return 0.4 * gray[..., None] + 0.6 * colormaps['inferno'](heat)[..., :3]


def _targets(classes: Sequence[int], count: int, num_classes: int) -> List[Any]:
    """Return class indices in the form that the package takes."""
    if len(classes) != count:
        raise ValueError(f'expected a class for each of {count} images, got {len(classes)}')
    for index in classes:
        if not 0 <= index < num_classes:
            raise ValueError(f'the class must lie in [0, {num_classes - 1}], got {index}')
    _import_grad_cam()
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    return [ClassifierOutputTarget(int(index)) for index in classes]


def _import_grad_cam() -> Any:
    try:
        import pytorch_grad_cam
    except ImportError as error:
        raise ImportError(
            f"heat maps need the grad-cam package: pip install 'smpconv_models[figures]' ({error})") from error
    return pytorch_grad_cam
