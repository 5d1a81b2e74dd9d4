"""One optimizer step over the batches of all ranks, which is skipped as a whole if a number in it is not finite."""
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Iterator, List, NamedTuple, Optional, Tuple

import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from smpconv_models.layers import clip_radius_

from . import rng
from .config import DeviceOptions
from .distributed import DistributedContext

BatchIterator = Iterator[Tuple[Tensor, Tensor]]


class StepResult(NamedTuple):
    """Result of one optimizer step.

    Attributes:
        loss: Mean loss over the step's images, of all ranks.
        lr: Largest learning rate of the parameter groups.
        applied: Whether the weights were updated.
        scale_overflow: Whether the step was skipped because float16's loss scale was too large; the scale is lower now.
        problem: What was not finite in a step that was skipped; '' otherwise.
        report_here: Whether this rank reports the skipped step: the rank with the loss or statistics at fault, rank 0
            for the gradient, which all ranks share.
        stop_requested: Whether any rank was asked to stop.
    """
    loss: float
    lr: float
    applied: bool
    scale_overflow: bool
    problem: str
    report_here: bool
    stop_requested: bool


@dataclass(eq=False)
class TrainStep:
    """Optimizer steps of a model.

    The order is: forward and backward passes, clipping of the gradient, optimizer, clipping of the radii, EMA, next
    learning rate. The original release clips the radii after its EMA has read the weights.

    Args:
        model: Unwrapped model, whose parameters the optimizer has.
        wrapped: Model that is called: the model itself, compiled, or distributed.
        ema: EMA of the weights, if any.
        optimizer: Optimizer over :func:`param_groups`.
        scheduler: timm scheduler, stepped once per optimizer update.
        scaler: Gradient scaler; a no-op unless AMP runs in float16.
        loss_fn: Loss of (logits, targets).
        mixup: timm's Mixup, if any.
        device: Device of the model.
        world: Ranks that share each step.
        device_options: Precision and memory layout.
        seed: Seed of the run.
        grad_accum_steps: Number of batches of a step.
        clip_grad: Largest norm of the gradient, None for no limit.
        recomputes: Whether the model recomputes activations, which updates running statistics twice.

    Attributes:
        last_applied: Number and learning rate of the last step that was applied; None before the first one.
        keeps_batch: Whether to keep the last batch.
        last_batch: Images and class indices of the last batch, before Mixup; None if it is not kept.
    """

    model: nn.Module
    wrapped: nn.Module
    ema: Optional[ModelEmaV3]
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    loss_fn: nn.Module
    mixup: Optional[Mixup]
    device: torch.device
    world: DistributedContext
    device_options: DeviceOptions = DeviceOptions()
    seed: int = 0
    grad_accum_steps: int = 1
    clip_grad: Optional[float] = None
    recomputes: bool = False

    def __post_init__(self) -> None:
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group['params']]
        self.buffers = list(self.model.buffers())
        self.finite = [value for value in self.buffers if value.is_floating_point() and value.isfinite().all()]
        self.last_applied: Optional[Tuple[int, float]] = None
        self.keeps_batch = False
        self.last_batch: Optional[Tuple[Tensor, Tensor]] = None

    def step(self, batches: BatchIterator, number: int, stop_requested: bool) -> StepResult:
        """Accumulate the gradients of a step's batches, and apply them if all of the step is finite.

        Args:
            batches: Batches of this rank.
            number: Number of the step, from 0, over all epochs: the key of its random numbers.
            stop_requested: Whether this rank was asked to stop.

        Raises:
            FloatingPointError: If a weight is infinite or NaN.
        """
        lr = max(group['lr'] for group in self.optimizer.param_groups)
        before = self._copy_buffers()
        loss = self._accumulate(batches, number)
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm, *others = (
            nn.utils.get_total_norm(tensors).to(loss) for tensors in (gradients, self.finite, self.parameters))
        is_bad = ~torch.isfinite(torch.stack([loss, norm, *others]))
        sums = self.world.sum(loss / self.world.size, *is_bad, torch.tensor(stop_requested, device=self.device))
        mean, bad_losses, bad_norms, bad_statistics, bad_weights, stops = sums
        if bad_statistics or bad_weights:  # perhaps: the squares of finite values may be infinite
            is_bad[2], is_bad[3] = _has_bad(self.finite), _has_bad(self.parameters)
            bad_statistics, bad_weights = self.world.sum(*is_bad[2:])
        if bad_weights:
            raise FloatingPointError('a weight is not finite')
        applied = not (bad_losses or bad_norms or bad_statistics)
        if applied:
            self._apply(norm, number)
            self.last_applied = number, lr
        else:
            self._restore_buffers(before)
        scale = 0. if applied else self.scaler.get_scale()
        self.scaler.update()
        problem, report_here = '', False
        if bad_losses:
            problem, report_here = f'the loss is {mean}', bool(is_bad[0])
        elif bad_norms:
            problem, report_here = 'the gradient is not finite', self.world.is_primary
        elif bad_statistics:
            problem, report_here = 'running statistics of the batch norms are not finite', bool(is_bad[2])
        self.optimizer.zero_grad()
        self.scheduler.step_update(number + 1)
        return StepResult(
            loss=mean,
            lr=lr,
            applied=applied,
            scale_overflow=(
                not applied and not bad_losses and not bad_statistics and 1 < self.scaler.get_scale() < scale),
            problem=problem,
            report_here=report_here,
            stop_requested=bool(stops),
        )

    def _accumulate(self, batches: BatchIterator, number: int) -> Tensor:
        """Add up the gradients; return the mean loss of this rank."""
        total = torch.zeros((), device=self.device)
        for part in range(self.grad_accum_steps):
            is_last = part == self.grad_accum_steps - 1
            images, target = next(batches)
            images = images.to(self.device, memory_format=self.device_options.memory_format, non_blocking=True)
            target = target.to(self.device, non_blocking=True)
            if self.keeps_batch:
                self.last_batch = (images if self.mixup is None else images.clone()), target  # Mixup works in place
            rng.seed_everything(self.seed, 'step', number, part, self.world.rank)
            if self.mixup is not None:
                images, target = self.mixup(images, target)
            with nullcontext() if is_last else self._no_sync():
                with self.device_options.autocast(self.device):
                    logits = self.wrapped(images).float()  # the CPU's autocast leaves the loss in half precision
                    loss = self.loss_fn(logits, target) / self.grad_accum_steps
                once = self._copy_buffers() if self.recomputes else []
                self.scaler.scale(loss).backward()
                self._restore_buffers(once)  # the recomputed forward pass updates them again
            total += loss.detach()
        return total

    def _no_sync(self) -> AbstractContextManager:
        """Return a context without a sum over the ranks; a compiled model passes the call on."""
        return getattr(self.wrapped, 'no_sync', nullcontext)()

    def _copy_buffers(self) -> List[Tensor]:
        return [buffer.clone() for buffer in self.buffers]

    def _restore_buffers(self, values: List[Tensor]) -> None:
        for buffer, value in zip(self.buffers, values):
            buffer.copy_(value)

    def _apply(self, norm: Tensor, number: int) -> None:
        if self.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip_grad, norm)
        self.scaler.step(self.optimizer)
        clip_radius_(self.model)
        if self.ema is not None:
            self.ema.update(self.model, step=number + 1)


def _has_bad(tensors: List[Tensor]) -> bool:
    """Return whether any value is NaN or infinite."""
    return not all(tensor.isfinite().all() for tensor in tensors)
