"""Times that were predicted before a measurement, to be compared with the measured ones.

A file of predictions has one JSON object per line: milliseconds, and what they describe. Such as:

    {"case": "t_56", "result": "y", "path": "auto/nchw", "dtype": "bfloat16", "ms": 0.089}
    {"network": "smpconv_t", "compiled": false, "ms": 31.5}
    {"network": "smpconv_t", "compiled": false, "category": "norms", "ms": 4.2}
    {"form": "block_forward", "height": 56, "width": 56, "kernel": 31, "ms": 0.087}

A prediction is compared with each measurement that has all of its values. One of a network without a category is of the
whole step; its dtype is that of autocast. Predictions that no measurement has are printed at the end.
"""
import json
import sys
from pathlib import Path
from typing import Any, Dict, Iterable, List, Set

# Keys of a measurement, and the types of their values.
KEYS = {
    'case': str, 'result': str, 'path': str, 'dtype': str, 'network': str, 'compiled': bool, 'category': str,
    'form': str, 'height': int, 'width': int, 'kernel': int,
}


class Predictions:
    """Predictions of a file.

    Attributes:
        compared: Positions of the predictions that a measurement has had.
    """

    def __init__(self, rows: List[Dict[str, Any]]) -> None:
        self._rows = rows
        self.compared: Set[int] = set()

    @classmethod
    def read(cls, path: Path) -> 'Predictions':
        """Read a file.

        Raises:
            ValueError: If the file cannot be read, or a line is no prediction.
        """
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f'{path} cannot be read: {error}') from error
        return cls([_parse(line, f'{path}, line {number}') for number, line in enumerate(lines, 1) if line.strip()])

    def seconds(self, **measurement: Any) -> List[float]:
        """Return the predictions for a measurement, described by values of ``KEYS``."""
        matching = [
            position for position, row in enumerate(self._rows)
            if row.get('category') == measurement.get('category')
            and all(measurement.get(key) == value for key, value in row.items() if key != 'ms')]
        self.compared.update(matching)
        return [self._rows[position]['ms'] / 1e3 for position in matching]

    def lines(self, seconds: float, **measurement: Any) -> List[str]:
        """Return a line for each prediction of a measurement."""
        name = ', '.join(str(value) for value in measurement.values())
        return [
            f'{name}: predicted {predicted * 1e3:.4g} ms, measured {seconds * 1e3:.4g} ms, {seconds / predicted:.2f} x'
            for predicted in self.seconds(**measurement)]

    def lines_except(self, compared: Iterable[int]) -> List[str]:
        """Return a line for each prediction that was not compared."""
        return [
            f'no measurement for the prediction {json.dumps(row)}'
            for position, row in enumerate(self._rows) if position not in compared]


def _parse(line: str, where: str) -> Dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f'{where}: expected a JSON object, got {line!r:.80}') from error
    if not isinstance(row, dict):
        raise ValueError(f'{where}: expected a JSON object, got {line!r:.80}')
    ms = row.get('ms')
    if type(ms) not in (int, float) or not 0 < ms <= sys.float_info.max:
        raise ValueError(f'{where}: ms must be a finite number above 0, got {ms!r:.80}')
    for key, value in row.items():
        if key != 'ms' and type(value) is not KEYS.get(key):
            raise ValueError(f'{where}: expected the keys {", ".join(KEYS)} and ms, got {key}={value!r}')
    if len(row) == 1:
        raise ValueError(f'{where}: ms describes nothing, expected one of {", ".join(KEYS)} too')
    return row
