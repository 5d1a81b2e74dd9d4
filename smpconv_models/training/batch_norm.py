"""Running statistics of batch norms, by which evaluation normalizes: how far they lag, and their recalibration.

Training normalizes by the statistics of each batch. The running statistics follow with a momentum of 0.1, so after a
few dozen steps, or while the weights change fast, evaluation sees another network than training.
"""
from contextlib import contextmanager
from typing import Any, Dict, Iterable, Iterator, List, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def frozen_modules(model: nn.Module) -> List[nn.Module]:
    """Return the modules with weights, all of which are frozen, and everything in these modules."""
    found: Dict[nn.Module, None] = {}
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            found.update(dict.fromkeys(module.modules()))
    return list(found)


def trained_norms(model: nn.Module) -> List[_BatchNorm]:
    """Return the batch norms with running statistics that are not in a frozen module."""
    frozen = set(frozen_modules(model))
    return [
        module for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and module not in frozen]


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[List[_BatchNorm]]:
    """Let the batch norms normalize by each batch's statistics; the rest of the model is in evaluation mode.

    Yields:
        The batch norms, whose running statistics follow with their momentum.
    """
    norms = trained_norms(model)
    model.eval()
    for norm in norms:
        norm.train()
    try:
        yield norms
    finally:
        model.eval()


@torch.inference_mode()
def recalibrate_bn_(models: Sequence[nn.Module], batches: Iterable[Tensor]) -> None:
    """Replace the running statistics of batch norms by the mean of the statistics of these batches.

    A norm whose new statistics would be infinite or NaN keeps its own.

    Args:
        models: Models, which are in evaluation mode afterwards.
        batches: Batches of images, each of which passes through all models.
    """
    before = []
    for model in models:
        for norm in trained_norms(model):
            before.append((norm, norm.momentum, [buffer.clone() for buffer in norm.buffers()]))
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all batches
    try:
        for images in batches:
            for model in models:
                with batch_statistics(model):
                    model(images)
    finally:
        for norm, momentum, values in before:
            norm.momentum = momentum
            if not all(buffer.isfinite().all() for buffer in norm.buffers()):
                _copy_(norm, values)


@torch.inference_mode()
def accuracy_by_statistics(model: Any, images: Tensor, target: Tensor) -> Tuple[float, float]:
    """Return top-1 of a batch in per cent, with the running statistics and with the batch's own.

    Args:
        model: Model, which is in evaluation mode afterwards; its running statistics stay.
        images: Batch of training images.
        target: Class indices of shape (N,).
    """
    running = model.eval()(images)
    with batch_statistics(model) as norms:
        before = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
        own = model(images)
        for norm, values in zip(norms, before):
            _copy_(norm, values)
    first, second = (100 * (logits.argmax(1) == target).float().mean().item() for logits in (running, own))
    return first, second


def _copy_(norm: _BatchNorm, values: List[Tensor]) -> None:
    for buffer, value in zip(norm.buffers(), values):
        buffer.copy_(value)
