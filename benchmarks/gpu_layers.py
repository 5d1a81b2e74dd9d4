"""Time the layers beside both layouts of F.conv2d and the minimum of floors.py. Rows go to depthwise.jsonl."""
import dataclasses
import importlib.util
from typing import Any, Dict, List

import ceilings
import depthwise
import gpu_run
import report as text
import torch
from cases import CASES, Case
from check import WrongResultError
from gpu_run import Report, Settings, say
from tqdm import tqdm

BATCH = 64
_DTYPES = ('bfloat16', 'float16', 'float32')
_DRY = Case('tiny_2x2', 2, 2, 2, 3, batch=1)
_FIRST = 30  # seconds that the first case may take


def run(settings: Settings) -> Report:
    report = Report()
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.conv.fp32_precision = 'ieee'
    rows: List[Dict[str, Any]] = []
    rates = ceilings.measured(settings.device, settings.is_dry)
    say(f'{rates.bytes_per_second / 1e12:.2f} TB/s, {rates.operations_per_second / 1e12:.0f} TFLOP/s in bfloat16')
    rounds, seconds = (1, 0.01) if settings.is_dry else (31, 0.15)
    for case, dtype in tqdm(_plan(settings.is_dry), desc='layers', disable=None):
        if not settings.is_dry and not settings.deadline.allows('layer', _FIRST):
            report.left_out.append(f'{case.name}, {dtype}')
            continue
        try:
            with settings.deadline.timed('layer'):
                row = depthwise.measure_layer(case, dtype, BATCH, settings.device, ['triton'], rounds, seconds)
        except (RuntimeError, WrongResultError) as error:
            report.add_fault(f'{case.name}, {dtype}: {gpu_run.error_line(error)}')
            continue
        row.update(ceilings=dataclasses.asdict(rates), clock=ceilings.clock(settings.device))
        rows.append(gpu_run.store(settings, 'depthwise', row))
        say(text.times(rows[-1:]), *_beside_predictions(row, settings))
    _summarize(rows, settings)
    return report


def _plan(is_dry: bool) -> List[Any]:
    if is_dry:
        return [(_DRY, 'float16')]
    first, *others = _DTYPES
    of_t = [case for case in CASES.values() if case.network == 'smpconv_t']
    return [*((case, first) for case in CASES.values()), *((case, dtype) for dtype in others for case in of_t)]


def _beside_predictions(row: Dict[str, Any], settings: Settings) -> List[str]:
    return [
        line for path, seconds in row['seconds'].items() for result, value in seconds.items()
        for line in settings.predictions.lines(value, case=row['case'], dtype=row['dtype'], path=path, result=result)]


def _summarize(rows: List[Dict[str, Any]], settings: Settings) -> None:
    """Print the sums over networks and the ratios that must not be above 1, and draw the first dtype."""
    for dtype in dict.fromkeys(row['dtype'] for row in rows):
        of_dtype = [row for row in rows if row['dtype'] == dtype]
        for table, given in ((text.times, text.sums(of_dtype)), (text.verdicts, of_dtype)):
            if given:
                say('', table(given))
    if not rows:
        return
    if importlib.util.find_spec('matplotlib') is None:
        say('no plot: matplotlib is not installed')
        return

    def predicted(row: Dict[str, Any], result: str) -> List[float]:
        return [
            value for path in row['seconds']
            for value in settings.predictions.seconds(case=row['case'], dtype=row['dtype'], path=path, result=result)]

    path = settings.results / 'gpu_layers.png'
    text.times_picture([row for row in rows if row['dtype'] == rows[0]['dtype']], path, predicted)
    say(f'plot: {path}')
