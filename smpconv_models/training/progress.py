"""How far a run is."""
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Dict, List, Optional


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
        return cls(**state)

    def plain(self) -> Dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    def next_epoch(self, row: Dict[str, Any]) -> None:
        """An epoch is done and measured."""
        self.rows.append(row)
        self.epoch += 1
        self.step, self.loss_sum, self.loss_count = 0, 0., 0
