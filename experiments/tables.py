"""Tables of experiments: rows as CSV, and means with standard deviations over seeds as Markdown."""
import csv
import io
import os
import platform
import statistics
import tempfile
from datetime import date
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Tuple, Union

import torch

from smpconv_models.training import atomic_write

Row = Mapping[str, Any]


def check_writable(paths: Sequence[Path]) -> None:
    """Create the files' folders, and check before the work starts that the files can be written.

    Raises:
        OSError: If a folder cannot be created or written to, or a path is a folder.
    """
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(f'{path} is a folder')
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding='utf-8')


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows under one header; a column that a row lacks is empty there."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def mean_std(values: Sequence[float]) -> Tuple[float, float]:
    """Return the mean and the standard deviation of a sample (over n - 1), NaN for a single value.

    Raises:
        ValueError: If there are no values.
    """
    if not values:
        raise ValueError('expected at least one value, got none')
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else float('nan')


def spread(values: Sequence[float], digits: int) -> str:
    """Return ``mean ± std`` with ``digits`` digits after the point, or a single value alone."""
    mean, std = mean_std(values)
    return f'{mean:.{digits}f} ± {std:.{digits}f}' if len(values) > 1 else f'{mean:.{digits}f}'


def summarize(rows: Sequence[Row], by: Sequence[str], digits: Mapping[str, int]) -> List[Dict[str, Any]]:
    """Return a row for each group of rows that agree in the columns ``by``, in the order of their first rows.

    Args:
        rows: Rows, one for each seed of each group.
        by: Names of the columns that define a group.
        digits: Digits after the point of each column's :func:`spread`, by its name.

    Returns:
        Rows with the columns ``by``, the spreads, and ``seeds``, the number of rows in the group.
    """
    groups: Dict[Tuple[Any, ...], List[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    return [{
        **dict(zip(by, key)),
        **{name: spread([row[name] for row in group], count) for name, count in digits.items()},
        'seeds': len(group),
    } for key, group in groups.items()]


def markdown(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """Return a Markdown table with a final newline.

    Args:
        rows: Rows; a missing value is an empty cell.
        columns: Headings by the names of the columns, in order.
    """
    lines = [list(columns.values()), ['---'] * len(columns)]
    lines += [[_cell(row.get(name, '')) for name in columns] for row in rows]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def _cell(value: Any) -> str:
    return str(value).replace('|', '\\|').replace('\n', ' ')


def environment(device: Union[str, torch.device] = 'cpu') -> Dict[str, Any]:
    """Return device, versions and date as columns of a row."""
    device = torch.device(device)
    on_cpu = f'{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores'
    return {
        'torch': torch.__version__,
        'device': on_cpu if device.type == 'cpu' else torch.cuda.get_device_name(device),
        'threads': torch.get_num_threads(),
        'date': date.today().isoformat(),
    }
