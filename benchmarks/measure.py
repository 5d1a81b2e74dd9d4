"""Measuring side by side, and keeping what was measured."""
import json
import os
import platform
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Callable, Dict

import timm
import torch
from tqdm import tqdm

RESULTS = Path(__file__).parent / 'results'


def interleaved(functions: Dict[str, Callable[[], object]], rounds: int) -> Dict[str, float]:
    """Median seconds of each function, called in turn so that what disturbs the machine disturbs all alike."""
    times = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in tqdm(range(rounds), desc='measuring', leave=False, disable=None):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def environment() -> Dict[str, object]:
    """On what and when."""
    return {
        'date': date.today().isoformat(),
        'device': _processor(),
        'threads': torch.get_num_threads(),
        'torch': torch.__version__,
        'timm': timm.__version__,
        'python': platform.python_version(),
    }


def _processor() -> str:
    """The processor's family and widest vectors: names that clouds give are less telling."""
    return f'{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores'


def append(file: str, row: Dict[str, object]) -> None:
    """Adds a row to ``results/FILE``, with :func:`environment`."""
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / file, 'a') as out:
        out.write(json.dumps({**environment(), **row}) + '\n')
