"""Measure functions side by side, and store the results."""
import importlib.metadata
import json
import math
import os
import platform
import random
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Any, Callable, Dict, Hashable, List, TypeVar, Union

import timm
import torch
from tqdm import tqdm

RESULTS = Path(__file__).parent / 'results'
MIN_ROUNDS = 3

Device = Union[str, torch.device]
Function = Callable[[], object]
Name = TypeVar('Name', bound=Hashable)


def interleaved(
        functions: Dict[Name, Function],
        rounds: int,
        seconds: float = math.inf,
        device: Device = 'cpu',
        clock: Callable[[], float] = time.perf_counter,
) -> Dict[Name, float]:
    """Return the median seconds of each function; they are called in turn, so that disturbances affect all equally.

    The order of each round is random, because a function also depends on the caches and the allocator state that the
    previous one left. The same forward pass on a CPU took 0.8 ms after a slow function of 48 ms, and 0.2 ms after
    others.

    Args:
        functions: Functions by name.
        rounds: Number of timed calls of each function, after one that is not timed.
        seconds: Total time after which a function drops out, but not before it was timed three times.
        device: Device of the functions. On CUDA this is the time on the device, with a cold L2 cache.
        clock: Clock for a CPU, in seconds. On a machine that others use, ``time.process_time`` leaves out the time in
            which the process waits; PyTorch must have one thread then, as threads that wait for others count.
    """
    stopwatch = _stopwatch(torch.device(device), clock)
    times: Dict[Name, List[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in tqdm(range(rounds), desc='measuring', leave=False, disable=None):
        for name, function in random.sample(list(functions.items()), len(functions)):
            if len(times[name]) < MIN_ROUNDS or sum(times[name]) < seconds:
                times[name].append(stopwatch(function))
    return {name: statistics.median(values) for name, values in times.items()}


def _stopwatch(device: torch.device, clock: Callable[[], float]) -> Callable[[Function], float]:
    """Return a function that measures the seconds of one call on ``device``."""
    if device.type == 'cuda':
        return _cuda_stopwatch(device)

    def seconds(function: Function) -> float:
        start = clock()
        function()
        return clock() - start

    return seconds


def _cuda_stopwatch(device: torch.device) -> Callable[[Function], float]:
    # Larger than any L2, so that one pass over it empties the cache. Eight passes take about half a millisecond at
    # 4 TB/s: the function's launches queue up behind them, and the events time the device rather than Python.
    buffer = torch.empty(2 ** 28, dtype=torch.uint8, device=device)

    def seconds(function: Function) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(8):
            buffer.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return seconds


def environment(device: Device = 'cpu') -> Dict[str, Any]:
    """Return device, versions and date."""
    device = torch.device(device)
    common = {
        'date': date.today().isoformat(),
        'device': _processor() if device.type == 'cpu' else torch.cuda.get_device_name(device),
        'threads': torch.get_num_threads(),
        'torch': torch.__version__,
        'timm': timm.__version__,
        'python': platform.python_version(),
    }
    if device.type == 'cpu':
        return common
    return {
        **common, 'cuda': torch.version.cuda, 'cudnn': torch.backends.cudnn.version(), 'triton': _version('triton')}


def _processor() -> str:
    """Return the processor's family and vector width, because names in clouds are less informative."""
    return f'{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores'


def _version(package: str) -> Union[str, None]:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def append(path: Path, row: Dict[str, Any], device: Device = 'cpu') -> Dict[str, Any]:
    """Append a row, preceded by :func:`environment`, to the file and return it."""
    row = {**environment(device), **row}
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'a') as out:
        out.write(json.dumps(row) + '\n')
    return row
