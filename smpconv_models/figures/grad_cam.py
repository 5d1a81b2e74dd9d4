"""What in an image speaks for a class: Grad-CAM and its kin, by the grad-cam package."""
from pathlib import Path
from typing import Any, List, Optional, Sequence, Union

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from .forward import applied
from .kernels import check_known

# Of pytorch_grad_cam, those that need no more than a layer's activations and gradients.
METHODS = ('GradCAM', 'GradCAMPlusPlus', 'XGradCAM', 'HiResCAM', 'LayerCAM', 'EigenGradCAM')


def heat_maps(
        model: nn.Module,
        images: Tensor,
        layer: Optional[str] = None,
        classes: Optional[Sequence[int]] = None,
        method: str = 'GradCAM',
) -> np.ndarray:
    """Heat maps of images by the grad-cam package: where a layer's features speak for a class.

    Each map is enlarged to its image and stretched to [0, 1]: maps of different images don't compare. One that is zero
    all over says that nothing there speaks for the class.

    Args:
        model: A classifier in evaluation mode; its parameters' gradients are cleared.
        images: As the model takes them, ``(N, C, H, W)``.
        layer: Name of a module whose output is ``(N, C', H', W')``, else that of the last stage.
        classes: The class of each image, else the predicted ones.
        method: One of :data:`METHODS`.

    Returns:
        Of shape ``(N, H, W)``, float32 in [0, 1].

    Raises:
        ImportError: The package isn't installed.
        ValueError: There are no such layer, classes or method; the model is in training mode, can't take the images or
            has no logits ``(N, classes)``, or not finite ones.
    """
    if method not in METHODS:
        raise ValueError(f'method must be one of {METHODS}, got {method!r}')
    if model.training:
        raise ValueError('the model must be in evaluation mode: model.eval()')
    logits = predict(model, images)
    targets = _targets(classes, *logits.shape)
    layer = _last_stage(model) if layer is None else layer
    modules = dict(model.named_modules())
    check_known(layer, [name for name in modules if name])
    cam = getattr(_library(), method)(model=model, target_layers=[modules[layer]])
    try:
        # images with gradients, or those of a frozen network would have none
        maps = cam(input_tensor=images.detach().clone().requires_grad_(), targets=targets)
    except (IndexError, TypeError, ValueError, np.exceptions.AxisError) as error:
        raise ValueError(f'{layer} has no feature maps of shape (N, C, H, W) that the logits depend on') from error
    finally:
        cam.activations_and_grads.release()
        model.zero_grad()
    return np.asarray(maps, dtype=np.float32).clip(0, 1)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits ``(N, classes)`` of images, which must be finite.

    Raises:
        ValueError: The model can't take the images, or its output is something else.
    """
    if len(images) == 0:
        raise ValueError('expected at least one image, got none')
    logits = applied(model, images)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] == 0:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f'expected a classifier with logits of shape (N, classes), got {got}')
    if not logits.isfinite().all():
        raise ValueError('the logits are not finite')
    return logits


def _library() -> Any:
    try:
        import pytorch_grad_cam
    except ImportError as error:
        raise ImportError(
            f"heat maps need the grad-cam package: pip install 'smpconv_models[figures]' ({error})") from error
    return pytorch_grad_cam


def _targets(classes: Optional[Sequence[int]], count: int, num_classes: int) -> Optional[List[Any]]:
    """As the package takes them; None for the predicted classes."""
    if classes is None:
        return None
    if len(classes) != count:
        raise ValueError(f'expected a class for each of {count} images, got {len(classes)}')
    for index in classes:
        if not 0 <= index < num_classes:
            raise ValueError(f'the class must lie in [0, {num_classes - 1}], got {index}')
    _library()
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    return [ClassifierOutputTarget(int(index)) for index in classes]


def _last_stage(model: Any) -> str:
    info = getattr(model, 'feature_info', None)
    if not isinstance(info, list) or not info:
        raise ValueError('the model has no named stages: name a layer')
    return info[-1]['module']


def save_heat_maps(
        path: Union[str, Path],
        images: Tensor,
        maps: np.ndarray,
        titles: Sequence[str],
        columns: int = 4,
) -> None:
    """A PNG of images, each beside itself under its heat map.

    Args:
        path: Where to.
        images: To look at, ``(N, 1 or 3, H, W)`` in [0, 1].
        maps: Of :func:`heat_maps`, ``(N, H, W)``.
        titles: Of each image.
        columns: Pairs in a row.

    Raises:
        ValueError: There are not as many of each, or they differ in size.
    """
    if not len(images) == len(maps) == len(titles) or images.shape[-2:] != maps.shape[-2:]:
        raise ValueError(
            f'expected as many images as maps and titles, of one size, got {tuple(images.shape)}, {maps.shape} and '
            f'{len(titles)}')
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(3.2 * columns, 1.85 * rows), layout='constrained')
    parts: Any = figure.subfigures(rows, columns, squeeze=False).ravel()
    for part, image, heat, title in zip(parts, images, maps, titles):
        _draw(part, image, heat, title)
    figure.savefig(path, dpi=130, format='png')


def _draw(part: Any, image: Tensor, heat: np.ndarray, title: str) -> None:
    part.suptitle(title, fontsize=9, parse_math=False)
    pixels = image.detach().cpu().permute(1, 2, 0).clamp(0, 1).numpy()
    alone, under = part.subplots(1, 2)
    alone.imshow(pixels, cmap='gray', vmin=0, vmax=1)
    under.imshow(pixels.mean(2), cmap='gray', vmin=0, vmax=1)
    under.imshow(heat, cmap='inferno', vmin=0, vmax=1, alpha=0.6)
    for axes in (alone, under):
        axes.set(xticks=[], yticks=[])
