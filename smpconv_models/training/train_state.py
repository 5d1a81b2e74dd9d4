"""How far a run is."""
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Dict, List, Optional

from smpconv_models.checkpoint import description


@dataclass
class Progress:
    """Where a run is, in plain data.

    Attributes:
        epoch: Epochs that are done, with their evaluation.
        step: Steps of the next one that are done.
        loss_sum: Of those steps' losses, of those that were finite.
        loss_count: How many those were.
        refused: Steps in a row, up to now, that were not applied as a number was not finite.
        unreadable: How often an image was left out as it could not be read, over all processes.
        best_epoch: The one of the best accuracy.
        rows: What was measured after each epoch.
    """
    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.
    loss_count: int = 0
    refused: int = 0
    unreadable: int = 0
    best_epoch: Optional[int] = None
    rows: List[Dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, state: Any) -> 'Progress':
        """From what :func:`dataclasses.asdict` gave.

        Raises:
            ValueError: It is something else.
        """
        if not isinstance(state, dict) or set(state) != {item.name for item in fields(cls)}:
            raise ValueError('it does not say how far its run was; --initial-checkpoint takes its weights')
        for name in ('epoch', 'step', 'loss_count', 'refused', 'unreadable'):
            description.number(f'progress.{name}', state[name], 0, 1 << 62, whole=True)
        description.number('progress.loss_sum', state['loss_sum'], -math.inf, math.inf)
        rows = state['rows']
        if not isinstance(rows, list) or len(rows) != state['epoch'] or not all(map(_is_row, rows)):
            raise ValueError(f'progress.rows must be a row of numbers for each of {state["epoch"]} epochs')
        if state['best_epoch'] is not None:
            description.number('progress.best_epoch', state['best_epoch'], 0, len(rows) - 1, whole=True)
        return cls(**state)

    def plain(self) -> Dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    def next_epoch(self, row: Dict[str, Any]) -> None:
        """An epoch is done and measured."""
        self.rows.append(row)
        self.epoch += 1
        self.step, self.loss_sum, self.loss_count = 0, 0., 0


# Columns that every row has, see train._measure.
_COLUMNS = {'epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr'}


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and row.keys() >= _COLUMNS and all(
        isinstance(key, str) and isinstance(value, (int, float)) for key, value in row.items())
