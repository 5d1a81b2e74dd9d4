"""Check the operation on a GPU: layers, forms of the kernels, and uses; and run the tests that are marked `gpu`.

The layers' results and those of each form are compared with float64, as before every timing. The tests run beside, in
several processes. Rows go to gpu_check.jsonl.
"""
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple
from xml.etree import ElementTree

import check
import gpu_run
import gpu_tiles
import layer
import torch
from cases import CASES, Case
from checkout import ROOT
from gpu_run import Report, Settings, say
from torch import Tensor
from tqdm import tqdm

import smpconv_models
from smpconv_models.ops._triton import tuning

_RESERVE = 30  # seconds in which the tests may still end
# Types and precisions of float32 in the order of checking; the first is checked on all layers.
_MODES = (('bfloat16', 'ieee'), ('float16', 'ieee'), ('float32', 'tf32'), ('float32', 'ieee'))
_DRY = Case('tiny_2x33', 2, 2, 33, 3, batch=1)
_OTHERS = ('smpconv_t', 'smpconv_mobile51')  # networks whose layers are checked in the other modes too


def run(settings: Settings) -> Report:
    report = Report()
    with tempfile.TemporaryDirectory() as folder, _tests_beside(settings, Path(folder)) as tests:
        _check_layers(settings, report)
        _check_uses(settings, report)
        if tests:
            _finish_tests(tests, Path(folder), settings, report)
    return report


# --- layers and forms ---


def _check_layers(settings: Settings, report: Report) -> None:
    for case, (dtype, precision) in tqdm(_plan(settings.is_dry), desc='checking layers', disable=None):
        name = f'{case.name}, {dtype}{f" as {precision}" * (dtype == "float32")}'
        if settings.deadline.left() < 2 * _RESERVE and not settings.is_dry:
            report.left_out.append(name)
            continue
        try:
            with _fp32_precision(precision):
                row = _layer_row(case, dtype, precision, settings.device)
        except RuntimeError as error:
            report.add_fault(f'{name}: {gpu_run.error_line(error)}')
            continue
        gpu_run.store(settings, 'gpu_check', row)
        for fault in row['faults']:
            report.add_fault(f'{name}: {fault}')
        if not row['faults']:
            errors = {key: max(errors.values()) for key, errors in row['errors'].items() if key.startswith('triton')}
            say(f'right: {name}: {", ".join(f"{key} {error:.1e}" for key, error in errors.items())}')


def _plan(is_dry: bool) -> List[Tuple[Case, Tuple[str, str]]]:
    if is_dry:
        return [(_DRY, ('float16', 'ieee'))]
    first, *others = _MODES
    return [*((case, first) for case in CASES.values()),
            *((case, mode) for mode in others for case in CASES.values() if case.network in _OTHERS)]


def _layer_row(case: Case, dtype: str, precision: str, device: torch.device) -> Dict[str, Any]:
    """Compare every path of a layer, and every form of the kernels that the device takes, with float64."""
    inputs = layer.make_inputs(case, case.batch or gpu_tiles.BATCH, getattr(torch, dtype), device)
    found = list(check.compare(layer.paths(['triton'], *inputs), *inputs))
    if dtype != 'float32':
        exact = check.Exact(*inputs)
        x, weight, grad = inputs
        for step, *maps in (('forward',), ('weight_grad', grad)):
            for form, (tile, *_) in tuning.candidates(step, x, weight.shape[2:], gpu_tiles.MODE, *maps):
                job = gpu_tiles.Job(form, len(x), case.channels, case.height, case.width, case.kernel)
                found.append(job.comparison(inputs, exact, tile))
    errors: Dict[str, Dict[str, float]] = {}
    for path, result, error, _ in found:
        errors.setdefault(path, {})[result] = max(errors.get(path, {}).get(result, 0.), error)
    return {
        'check': 'layer', 'case': case.name, 'batch': len(inputs[0]), 'channels': case.channels, 'height': case.height,
        'width': case.width, 'kernel': case.kernel, 'dtype': dtype, 'fp32_precision': precision, 'errors': errors,
        # plain conv2d is PyTorch's: its errors are in the row, and are no fault of this package
        'faults': [str(each) for each in found if not each.is_right and not each.path.startswith('plain/')],
    }


@contextmanager
def _fp32_precision(precision: str) -> Iterator[None]:
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = precision
    try:
        yield
    finally:
        conv.fp32_precision = before


# --- uses ---


def _check_uses(settings: Settings, report: Report) -> None:
    """Check results in graphs, on other streams, under autocast and compiled, against the plain call."""
    device, is_dry = settings.device, settings.is_dry
    uses: Dict[str, Callable[[Tensor, Tensor], Tensor]] = {'the same bits again': _ours}
    if device.type == 'cuda':
        uses.update({
            'another stream': _on_another_stream, 'a CUDA graph': _in_a_graph, 'autocast': _under_autocast,
            'torch.compile': _compiled('default'), 'torch.compile, reduce-overhead': _compiled('reduce-overhead')})
    case = _DRY if is_dry else CASES['t_14']
    dtype = torch.float16 if is_dry else torch.bfloat16
    x, weight, _ = layer.make_inputs(case, case.batch or gpu_tiles.BATCH, dtype, device)
    expected = _ours(x, weight)
    for name, use in uses.items():
        try:
            fault = None if torch.equal(use(x, weight), expected) else 'another result'
        except RuntimeError as error:  # of CUDA, Triton's launch and torch.compile
            fault = gpu_run.error_line(error)
        gpu_run.store(settings, 'gpu_check', {'check': 'use', 'use': name, 'faults': [fault] if fault else []})
        if fault:
            report.add_fault(f'{name}: {fault}')
        else:
            say(f'right: {name}')


def _ours(x: Tensor, weight: Tensor) -> Tensor:
    return smpconv_models.depthwise_conv2d(x, weight, backend='triton')


def _on_another_stream(x: Tensor, weight: Tensor) -> Tensor:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = _ours(x, weight)
    torch.cuda.current_stream().wait_stream(stream)
    return y


def _in_a_graph(x: Tensor, weight: Tensor) -> Tensor:
    """Capture a call on other values, then replay it on these."""
    static = torch.randn_like(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = _ours(static, weight)
    static.copy_(x)
    graph.replay()
    return y


def _under_autocast(x: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast('cuda', x.dtype):
        return _ours(x.float(), weight.float())


def _compiled(mode: str) -> Callable[[Tensor, Tensor], Tensor]:
    def call(x: Tensor, weight: Tensor) -> Tensor:
        function = torch.compile(_ours, fullgraph=True, mode=mode)
        for _ in range(3):  # graphs are captured at the second call
            y = function(x, weight).clone()
        return y
    return call


# --- tests ---


@contextmanager
def _tests_beside(settings: Settings, folder: Path) -> Iterator[Optional[subprocess.Popen]]:
    """Start pytest beside the block, on the modules with marked tests alone: others take packages that may be missing.

    The project's options for pytest are left out, because its settings need pytest-timeout to be valid.
    """
    if importlib.util.find_spec('pytest') is None:
        say('no tests: pytest is not installed')
        yield None
        return
    modules = [str(path) for path in sorted((ROOT / 'tests').rglob('test_*.py')) if 'mark.gpu' in path.read_text()]
    if settings.is_dry:  # the marked ones are loaded, but need a GPU: one that needs nothing
        which = ['-k', 'only_whole_words', *modules, 'tests/test_words.py']
    else:
        which = ['-m', 'gpu', '--continue-on-collection-errors', *modules]
        if importlib.util.find_spec('xdist'):
            which += ['-n', str(min(10, max(1, (os.cpu_count() or 2) - 4))), '--dist', 'worksteal']
    command = [sys.executable, '-m', 'pytest', '-q', '-o', 'addopts=', '-p', 'no:cacheprovider', '--tb', 'short',
               '--junitxml', str(folder / 'tests.xml'), *which]
    with open(folder / 'tests.log', 'w') as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _finish_tests(process: subprocess.Popen, folder: Path, settings: Settings, report: Report) -> None:
    """Wait for the tests until the phase's time ends; then they are interrupted, and write what they have."""
    is_late = False
    try:
        process.wait(max(settings.deadline.left() - _RESERVE, 1))
    except subprocess.TimeoutExpired:
        is_late = True
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_RESERVE / 2)
        except subprocess.TimeoutExpired:
            process.kill()
    log, results = (folder / 'tests.log').read_text(), folder / 'tests.xml'
    row = {'check': 'tests', **(_read_results(results) if results.exists() else {'passed': 0, 'faults': []})}
    if is_late:
        row['faults'].append('the tests were interrupted for lack of time')
    elif (process.returncode and not row['faults']) or not row['passed']:
        row['faults'].append(f'pytest ended with exit code {process.returncode}: {log.strip()[-600:]}')
    gpu_run.store(settings, 'gpu_check', row)
    for fault in row['faults']:
        report.add_fault(fault)
    say(f'tests: {row["passed"]} passed, {row.get("skipped", 0)} skipped, {len(row["faults"])} faults')


def _read_results(path: Path) -> Dict[str, Any]:
    """Return the numbers of passed and skipped tests, and a line for each failure, of pytest's XML."""
    passed = skipped = 0
    faults = []
    for test in ElementTree.parse(path).iter('testcase'):
        failures = [*test.findall('failure'), *test.findall('error')]
        skipped += test.find('skipped') is not None
        passed += not failures and test.find('skipped') is None
        name = f'{test.get("classname")}::{test.get("name")}'
        faults += [f'{name}: {(each.get("message") or "").strip()[:300]}' for each in failures]
    return {'passed': passed, 'skipped': skipped, 'faults': faults}
