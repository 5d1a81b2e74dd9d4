"""The metrics of a model on images that it doesn't train on."""
from argparse import Namespace
from typing import Any, Dict, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .distributed import DistributedContext
from .model_factory import autocast, memory_format
from .signals import GracefulStop
from .skipped import SkippedInEvaluation


class EvalLoader(NamedTuple):
    """Images for evaluation.

    Attributes:
        loader: Of (images, class indices).
        world: The processes that they are divided among.
        left_out: Knows those that could not be read.
    """
    loader: Any
    world: DistributedContext
    left_out: SkippedInEvaluation


class ClassificationMeter:
    """Sums over evaluated images, each counted once, in float64 and whole numbers.

    Args:
        device: Where the logits are.
        num_classes: Count each pair of class and prediction too, for so many classes.
    """

    def __init__(self, device: torch.device, num_classes: int = 0) -> None:
        precision = torch.float32 if device.type == 'mps' else torch.float64  # MPS has no better
        self.sums = torch.zeros(3, dtype=precision, device=device)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def add(self, logits: Tensor, target: Tensor) -> None:
        """One batch: logits ``(N, classes)``, class indices ``(N,)``."""
        logits = logits.float()
        losses = F.cross_entropy(logits, target, reduction='none')
        predictions = logits.topk(min(5, logits.shape[1])).indices
        right = predictions == target[:, None]
        self.sums += torch.stack([losses.to(self.sums).sum(), right[:, :1].sum(), right.sum()])
        self.count += len(target)
        if self.confusion.numel():
            pairs = target * len(self.confusion) + predictions[:, 0]  # argmax may see a tie the other way
            self.confusion += torch.bincount(pairs, minlength=self.confusion.numel()).view_as(self.confusion)

    def result(self, world: DistributedContext, may_be_empty: bool = False) -> Dict[str, Any]:
        """The metrics over all processes, which must call this together.

        Raises:
            ValueError: There were no images, and may not be none.
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
        images: EvalLoader,
        device: torch.device,
        args: Namespace,
        description: str = 'validating',
        num_classes: int = 0,
        stop: Optional[GracefulStop] = None,
) -> Dict[str, Any]:
    """Cross-entropy and accuracies of a model, each image counted once, over however many processes.

    Args:
        model: In evaluation mode, on ``device``.
        images: What to evaluate.
        device: Where to run.
        args: For mixed precision and layout.
        description: Of the progress bar, which shows on a terminal only.
        num_classes: Make a confusion matrix for so many classes.
        stop: Looked at after each batch; the metrics are of what was done by then, and to be thrown away.

    Returns:
        ``loss``, ``top1`` and ``top5`` (in per cent; top5 of as many as there are classes), ``count``, and
        ``confusion``, of shape ``(num_classes, num_classes)``: row the class, column the prediction.

    Raises:
        ValueError: There are no images.
    """
    tally = ClassificationMeter(device, num_classes)
    with tqdm(images.loader, desc=description, leave=False, disable=None) as bar:  # gone when an error is told
        for batch, target in bar:
            if stop is not None and stop.number is not None:
                break
            batch = batch.to(device, memory_format=memory_format(args), non_blocking=True)
            target = target.to(device, non_blocking=True)
            with autocast(args, device):
                logits = model(batch)
            tally.add(logits, target)
    is_stopped = stop is not None and stop.number is not None
    return tally.result(images.world, may_be_empty=is_stopped)
