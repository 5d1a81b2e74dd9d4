"""Settings and reports of the phases of gpu.py."""
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List

import measure
import torch
from limits import Deadline
from predictions import Predictions
from tqdm import tqdm

from smpconv_models.utils.errors import first_line


@dataclass(frozen=True)
class Settings:
    """Settings of a phase.

    Attributes:
        device: Device to measure.
        is_dry: Whether sizes are tiny and the device is a CPU, on which Triton's kernels are interpreted.
        results: Folder for rows and the plot.
        configs: Folder for tuned tiles.
        predictions: Predictions to compare with.
        deadline: End of the phase's time.
    """
    device: torch.device
    is_dry: bool
    results: Path
    configs: Path
    predictions: Predictions
    deadline: Deadline


@dataclass
class Report:
    """Results of a phase that are wrong or missing, and parts that were left out for lack of time."""
    faults: List[str] = field(default_factory=list)
    left_out: List[str] = field(default_factory=list)

    def add_fault(self, fault: str) -> None:
        """Add and print a fault: a line that names the part and what is wrong or missing."""
        self.faults.append(fault)
        say(f'WRONG: {fault}')


def say(*lines: str) -> None:
    """Print lines beside a progress bar."""
    for line in lines:
        tqdm.write(line)


def store(settings: Settings, name: str, row: Dict[str, Any]) -> Dict[str, Any]:
    """Append a row to a file of the results, at once."""
    return measure.append(settings.results / f'{name}.jsonl', row, settings.device)


def error_line(error: BaseException) -> str:
    """Return the type and the first line of an error, for a row or a line of text."""
    return f'{type(error).__name__}: {first_line(error)}'
