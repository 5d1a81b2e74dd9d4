"""Metrics of a model on validation images."""
from typing import Any, Dict, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .config import DeviceOptions
from .distributed import DistributedContext, GracefulStop
from .loader import EvalLoader


class ClassificationMeter:
    """Sums over evaluated images, each counted once, in float64 and whole numbers.

    Args:
        device: Device of the logits.
        num_classes: Number of classes of the confusion matrix, 0 for none.
    """

    def __init__(self, device: torch.device, num_classes: int = 0) -> None:
        precision = torch.float32 if device.type == 'mps' else torch.float64  # MPS has no float64
        self.sums = torch.zeros(3, dtype=precision, device=device)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def add(self, logits: Tensor, target: Tensor) -> None:
        """Add one batch: logits ``(N, classes)``, class indices ``(N,)``."""
        logits = logits.float()
        losses = F.cross_entropy(logits, target, reduction='none')
        predictions = logits.topk(min(5, logits.shape[1])).indices
        right = predictions == target[:, None]
        self.sums += torch.stack([losses.to(self.sums).sum(), right[:, :1].sum(), right.sum()])
        self.count += len(target)
        if self.confusion.numel():
            pairs = target * len(self.confusion) + predictions[:, 0]  # argmax may break a tie differently
            self.confusion += torch.bincount(pairs, minlength=self.confusion.numel()).view_as(self.confusion)

    def result(self, world: DistributedContext, may_be_empty: bool = False) -> Dict[str, Any]:
        """Return the metrics over all ranks, which must call this together.

        Raises:
            ValueError: If there were no images, unless that is allowed.
        """
        for tensor in (self.sums, self.count, self.confusion):
            world.all_reduce_(tensor)
        count = int(self.count)
        if count == 0 and not may_be_empty:
            raise ValueError('there were no images to evaluate')
        loss, top1, top5 = (self.sums / max(count, 1)).tolist()
        return {'loss': loss, 'top1': 100 * top1, 'top5': 100 * top5, 'count': count, 'confusion': self.confusion}


@torch.inference_mode()
def evaluate(
        model: nn.Module,
        loader: EvalLoader,
        device: torch.device,
        options: DeviceOptions = DeviceOptions(),
        description: str = 'validating',
        num_classes: int = 0,
        stop: Optional[GracefulStop] = None,
) -> Dict[str, Any]:
    """Compute cross-entropy and accuracies of a model, each image counted once, over any number of ranks.

    Args:
        model: Model in evaluation mode, on ``device``.
        loader: Images to evaluate.
        device: Device to run on.
        options: Mixed precision and memory layout.
        description: Text of the progress bar, which is shown on a terminal only.
        num_classes: Number of classes of a confusion matrix, 0 for none.
        stop: Checked after every batch; if set, evaluation stops and the partial metrics must be discarded.

    Returns:
        ``loss``, ``top1`` and ``top5`` (in per cent; top5 of as many as there are classes), ``count``, and
        ``confusion`` of shape ``(num_classes, num_classes)``, whose rows are classes and columns predictions.

    Raises:
        ValueError: If there are no images.
    """
    meter = ClassificationMeter(device, num_classes)
    with tqdm(loader.loader, desc=description, leave=False, disable=None) as bar:  # closed before an error is reported
        for images, target in bar:
            if stop is not None and stop.number is not None:
                break
            images = images.to(device, memory_format=options.memory_format, non_blocking=True)
            target = target.to(device, non_blocking=True)
            with options.autocast(device):
                logits = model(images)
            meter.add(logits, target)
    return meter.result(loader.world, may_be_empty=stop is not None and stop.number is not None)
