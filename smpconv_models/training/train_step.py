"""One optimizer step: the batches of all processes, and nothing of it where a number isn't finite."""
from argparse import Namespace
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Iterator, List, NamedTuple, Optional, Tuple

import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from smpconv_models.layers import clip_radius_

from . import rng
from .distributed import DistributedContext
from .model_factory import autocast, memory_format

Batches = Iterator[Tuple[Tensor, Tensor]]


class Outcome(NamedTuple):
    """What a step came to.

    Attributes:
        loss: Mean over the step's images, of all processes.
        rate: The largest of the parameter groups.
        applied: Whether the weights took it.
        is_overflow: Not applied as half precision's loss scale was too large, which is lower now.
        problem: What was not finite in a step that was not applied; '' otherwise.
        is_mine: Not applied for this process's loss or statistics; for all processes' gradient, it is the first one's.
        stop: Whether a process was asked to stop.
    """
    loss: float
    rate: float
    applied: bool
    is_overflow: bool
    problem: str
    is_mine: bool
    stop: bool


@dataclass(eq=False)
class TrainStep:
    """Does optimizer steps.

    In this order: forward and backward passes, clipping of the gradient, the optimizer, clipping of the radii, the
    average, the next rate. The original release clips the radii after the average has read the weights.

    Args:
        args: Precision, layout, accumulation, clipping.
        model: Bare: its parameters are the optimizer's.
        wrapped: What is called: the model itself, compiled, or distributed.
        ema: The average.
        optimizer: Of :func:`param_groups`.
        scheduler: timm's, counting steps.
        scaler: Of float16's gradients; disabled else.
        loss_fn: Of (logits, targets).
        mixup: timm's.
        device: Where the model is.
        world: The processes that share each step.

    Attributes:
        last_applied: Number and learning rate of the last step that was applied; None before the first one.
    """

    args: Namespace
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

    def __post_init__(self) -> None:
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group['params']]
        self.statistics = list(self.model.buffers())
        self.finite = [value for value in self.statistics if value.is_floating_point() and value.isfinite().all()]
        self.last_applied: Optional[Tuple[int, float]] = None

    def step(self, batches: Batches, number: int, is_asked_to_stop: bool) -> Outcome:
        """Takes as many batches as a step accumulates, and applies their gradient if all of it is finite.

        Args:
            batches: Of this process.
            number: Of the step, from 0, over all epochs: the key of its random draws.
            is_asked_to_stop: Whether this process was; all of them learn of it.

        Raises:
            FloatingPointError: If a weight is infinite or NaN, after the last step that was applied.
        """
        rate = max(group['lr'] for group in self.optimizer.param_groups)
        before = self._copied_statistics()
        loss = self._accumulate(batches, number)
        self.scaler.unscale_(self.optimizer)
        norm, *others = (
            nn.utils.get_total_norm(tensors).to(loss) for tensors in (self._gradients(), self.finite, self.parameters))
        is_bad = ~torch.isfinite(torch.stack([loss, norm, *others]))
        totals = self.world.sum(
            loss / self.world.size, *is_bad, torch.tensor(is_asked_to_stop, device=self.device))
        mean, bad_losses, bad_norms, bad_statistics, bad_weights, stops = totals
        if bad_statistics or bad_weights:  # perhaps: the squares of finite values may be infinite
            is_bad[2], is_bad[3] = _has_bad(self.finite), _has_bad(self.parameters)
            bad_statistics, bad_weights = self.world.sum(*is_bad[2:])
        if bad_weights:
            raise FloatingPointError('a weight is not finite')
        applied = not (bad_losses or bad_norms or bad_statistics)
        if applied:
            self._apply(norm, number)
            self.last_applied = number, rate
        else:
            self._restore_statistics(before)
        scale = 0. if applied else self.scaler.get_scale()
        self.scaler.update()
        is_overflow = not applied and not bad_losses and not bad_statistics and 1 < self.scaler.get_scale() < scale
        problem, is_mine = '', False
        if bad_losses:
            problem, is_mine = f'the loss is {mean}', bool(is_bad[0])
        elif bad_norms:
            problem, is_mine = 'the gradient is not finite', self.world.is_primary
        elif bad_statistics:
            problem, is_mine = 'running statistics of the batch norms are not finite', bool(is_bad[2])
        self.optimizer.zero_grad()
        self.scheduler.step_update(number + 1)
        return Outcome(
            loss=mean,
            rate=rate,
            applied=applied,
            is_overflow=is_overflow,
            problem=problem,
            is_mine=is_mine,
            stop=bool(stops),
        )

    def _accumulate(self, batches: Batches, number: int) -> Tensor:
        """Adds up the gradients; returns the mean loss of this process."""
        total = torch.zeros((), device=self.device)
        for part in range(self.args.grad_accum_steps):
            is_last = part == self.args.grad_accum_steps - 1
            images, target = next(batches)
            images = images.to(self.device, memory_format=memory_format(self.args), non_blocking=True)
            target = target.to(self.device, non_blocking=True)
            rng.seed_everything(self.args.seed, 'step', number, part, self.world.rank)
            if self.mixup is not None:
                images, target = self.mixup(images, target)
            with nullcontext() if is_last else self._alone():
                with autocast(self.args, self.device):
                    logits = self.wrapped(images).float()  # the CPU's autocast leaves the loss in half precision
                    loss = self.loss_fn(logits, target) / self.args.grad_accum_steps
                once = self._copied_statistics() if self.args.grad_checkpointing else []
                self.scaler.scale(loss).backward()
                self._restore_statistics(once)  # the recomputed forward pass updates them again
            total += loss.detach()
        return total

    def _alone(self) -> AbstractContextManager:
        """Without a sum over the processes, if there are several; a compiled model passes this on."""
        return getattr(self.wrapped, 'no_sync', nullcontext)()

    def _copied_statistics(self) -> List[Tensor]:
        return [statistic.clone() for statistic in self.statistics]

    def _restore_statistics(self, values: List[Tensor]) -> None:
        for statistic, value in zip(self.statistics, values):
            statistic.copy_(value)

    def _apply(self, norm: Tensor, number: int) -> None:
        if self.args.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.args.clip_grad, norm)
        self.scaler.step(self.optimizer)
        clip_radius_(self.model)
        if self.ema is not None:
            self.ema.update(self.model, step=number + 1)

    def _gradients(self) -> List[Tensor]:
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]


def _has_bad(tensors: List[Tensor]) -> bool:
    """Return whether any value is NaN or infinite."""
    return not all(tensor.isfinite().all() for tensor in tensors)
