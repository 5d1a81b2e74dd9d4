"""Tune the tiles of the Triton kernels: from the default on, step by step to the fastest neighbor.

All neighbors of a round are built at the same time, one process per core, and checked there on one image. They are then
timed in turn. A tile is accepted if its results are right at the full size and it is faster than the default by
`MARGIN`. Accepted tiles are written after every round, in the format that smpconv_models/ops/_triton/tuning.py reads.
"""
import dataclasses
import json
import os
from datetime import date
from multiprocessing import TimeoutError, get_context
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

import check
import gpu_run
import measure
import torch
from cases import CASES
from gpu_run import Report, Settings, say
from limits import Deadline
from torch import Tensor
from tqdm import tqdm

from smpconv_models.ops._triton import launch, tuning
from smpconv_models.utils import atomic_io

MODE = 'half'
MARGIN = 1.03  # smaller gains are noise
BATCH = 64
_NETWORKS = ('smpconv_t', 'smpconv_mobile51', 'convnext_tiny')  # B differs from T in channels, which tiles ignore
_TYPES = {'cuda': torch.bfloat16, 'cpu': torch.float16}  # Triton's interpreter has no products of bfloat16
_RESERVE = 20  # seconds for the last round to be timed
_ROUND = 100  # seconds after which the tiles of a round that are not built are left out

Operands = Tuple[Tensor, Tensor, Tensor]


class Job(NamedTuple):
    """Kernel to tune, by the name of its form, for a layer."""
    form: str
    batch: int
    channels: int
    height: int
    width: int
    kernel: int

    def __str__(self) -> str:
        return f'{self.form} {self.channels}x{self.height}x{self.width} k{self.kernel}'

    @property
    def result(self) -> str:
        return 'y' if self.form.endswith('forward') else 'dw'

    def operands(self, device: torch.device, is_small: bool = False) -> Operands:
        """Return x, weight and the gradient of y; a small problem has one image and one channel.

        The small problem has the same alignment as the large one, so that both take the same build.
        """
        batch, channels = (1, 1) if is_small else (self.batch, self.channels)
        image, kernel = (batch, channels, self.height, self.width), (channels, 1, self.kernel, self.kernel)
        x, weight, grad = (
            torch.randn(size, device=device).to(_TYPES[device.type]) for size in (image, kernel, image))
        return x, weight, grad

    def run(self, operands: Operands, tile: Any) -> Tensor:
        x, weight, grad = operands
        function = launch._FORMS[self.form]
        if self.result == 'y':
            return function(x, weight, None, tile)
        return function(grad, x, [self.kernel, self.kernel], tile)

    def comparison(self, operands: Operands, exact: check.Exact, tile: Any) -> check.Comparison:
        """Compute the result into memory that was NaN, and compare it."""
        x, weight, _ = operands
        check.poison(x, weight)
        limit = check.limits_beside({}, x, weight)[self.result]
        return check.Comparison(self.form, self.result, exact.error(self.result, self.run(operands, tile)), limit)

    def default(self) -> Any:
        return tuning._DEFAULTS[self.form](self.batch, self.height, self.width, [self.kernel, self.kernel], MODE)

    def key(self) -> Tuple[Any, ...]:
        return self.form, MODE, self.batch, self.height, self.width, (self.kernel, self.kernel)


@dataclasses.dataclass
class Search:
    """State of the search for one job.

    Attributes:
        job: What is tuned.
        frontier: Tiles to build and time in the next round; the search has ended if there are none.
        seconds: Times of the tiles that were timed.
        best: Fastest tile that is right at the full size; the default at first.
        failed: Number of tiles that cannot be built or are wrong.
    """
    job: Job
    frontier: List[Any]
    best: Any
    seconds: Dict[Any, float] = dataclasses.field(default_factory=dict)
    seen: Set[Any] = dataclasses.field(default_factory=set)
    failed: int = 0

    @classmethod
    def start(cls, job: Job, configured: List[Any]) -> 'Search':
        default = job.default()
        return cls(job, list(dict.fromkeys([default, *configured, *neighbors(default)])), default)

    def is_better(self) -> bool:
        """Return whether the best tile is faster than the default by ``MARGIN``, or the default failed."""
        default = self.seconds.get(self.job.default())
        return self.best in self.seconds and (default is None or default > MARGIN * self.seconds[self.best])


def jobs(is_dry: bool, device: torch.device) -> List[Job]:
    """Return the kernels that the networks' layers take, those of SMPConv-T first."""
    if is_dry:
        return [Job('map_forward', 1, 2, 2, 2, 3), Job('block_forward', 1, 2, 2, 33, 3)]
    found = {}
    for case in CASES.values():
        if case.network in _NETWORKS:
            for form in _selected_forms(BATCH, case.height, case.width, case.kernel, device):
                job = Job(form, BATCH, case.channels, case.height, case.width, case.kernel)
                found.setdefault(job.key(), job)
    return list(found.values())


def forms_of(batch: int, height: int, width: int, kernel: int, device: torch.device) -> List[str]:
    """Return the forms that fit a map, the selected ones first."""
    selected = _selected_forms(batch, height, width, kernel, device)
    return list(dict.fromkeys([*selected, 'block_forward', 'block_weight_grad']))


def _selected_forms(batch: int, height: int, width: int, kernel: int, device: torch.device) -> List[str]:
    """Return the forms for devices of any kind, and before them those for this device."""
    capability, aligned = tuning._capability(device), tuning.alignment(width)
    forms = [tuning.forward_form(height, width), tuning.weight_grad_form(height, width)]
    if tuning.fits_hopper_grad(height, width, MODE, capability, aligned):
        forms.insert(0, 'hopper_map_weight_grad')
    if tuning.fits_hopper(batch, width, kernel, MODE, capability, aligned):
        forms.insert(0, 'hopper_forward')
    return forms


def neighbors(tile: Any) -> Iterator[Any]:
    """Yield the tiles that differ from a tile in one field, by a factor of 2, or by 1 in the number of stages."""
    for item in dataclasses.fields(tile):
        value = getattr(tile, item.name)
        if item.name == 'num_stages':
            values = [value - 1, value + 1]
        else:
            values = [value // 2, value * 2]
        for changed in values:
            least, most = {'num_warps': (1, 16), 'num_stages': (1, 6)}.get(item.name, (1, 512))
            if not least <= changed <= most:
                continue
            try:
                yield dataclasses.replace(tile, **{item.name: changed})
            except AssertionError:  # a tile whose fields do not fit each other
                continue


def run(settings: Settings) -> Report:
    report = Report()
    device = settings.device
    active = [Search.start(job, configured(settings.configs, job, device)) for job in jobs(settings.is_dry, device)]
    searches = list(active)
    if settings.is_dry:
        for search in active:
            search.frontier = search.frontier[:2]
    workers = 1 if settings.is_dry else max(1, (os.cpu_count() or 2) - 2)
    # CUDA does not survive a fork. A worker that the compiler ends is replaced.
    with get_context('fork' if settings.is_dry else 'spawn').Pool(workers) as pool:
        is_first = True
        while active and (is_first or (settings.deadline.left() > 3 * _RESERVE and not settings.is_dry)):
            is_first = False
            built = _build(active, pool, settings, report)
            for search in tqdm(active, desc='timing tiles', disable=None, leave=False):
                if settings.deadline.left() > _RESERVE / 4:
                    _advance(search, built[search.job], settings, report)
                    if not search.frontier:
                        _finish(search, settings)
            write(settings.configs, searches, settings.device)
            active = [search for search in active if search.frontier]
    for search in active:
        report.left_out.append(f'more tiles of {search.job}')
        _finish(search, settings)
    return report


def _build(active: List[Search], pool: Pool, settings: Settings, report: Report) -> Dict[Job, List[Any]]:
    """Build and check the tiles of all frontiers; return those that are right, by job."""
    pending = []
    for search in active:
        search.seen.update(search.frontier)
        pending += [
            (search, tile, pool.apply_async(_try, (search.job, tile, settings.device))) for tile in search.frontier]
    right: Dict[Job, List[Any]] = {search.job: [] for search in active}
    end = Deadline(_ROUND if settings.is_dry else min(_ROUND, settings.deadline.left() - 2 * _RESERVE))
    for search, tile, result in tqdm(pending, desc='building tiles', disable=None, leave=False):
        try:
            reason = result.get(max(end.left(), 0))
        except TimeoutError:
            reason = 'it was not built in time, or the compiler ended its process'
        if reason is None:
            right[search.job].append(tile)
            continue
        search.failed += 1
        if tile == search.job.default():
            report.add_fault(f'{search.job}, default {tile}: {reason}')
    return right


def _try(job: Job, tile: Any, device: torch.device) -> Optional[str]:
    """Build a tile into Triton's cache and run it; return why it is of no use."""
    from triton.errors import TritonError
    try:
        operands = job.operands(device, is_small=True)
        comparison = job.comparison(operands, check.Exact(*operands), tile)
    except (AssertionError, RuntimeError, ValueError, TritonError) as error:  # too large, or not a kernel's tile
        return gpu_run.error_line(error)
    return None if comparison.is_right else str(comparison)


def _advance(search: Search, tiles: List[Any], settings: Settings, report: Report) -> None:
    """Time tiles beside the best one, and move to the fastest that is right at the full size."""
    search.frontier = []
    job = search.job
    operands = job.operands(settings.device)
    exact = check.Exact(*operands)
    timed = list(dict.fromkeys([*([search.best] if search.best in search.seconds else []), *tiles]))
    if not timed:
        return
    functions: Dict[Any, Callable[[], Tensor]] = {tile: lambda tile=tile: job.run(operands, tile) for tile in timed}
    rounds, seconds = (1, 0.01) if settings.is_dry else (21, 0.1)
    try:
        found = measure.interleaved(functions, rounds, seconds, settings.device)
    except RuntimeError as error:
        report.add_fault(f'{job}: {gpu_run.error_line(error)}')
        return
    search.seconds.update(found)
    for tile in sorted(found, key=found.__getitem__):
        comparison = job.comparison(operands, exact, tile)
        if comparison.is_right:
            break
        search.failed += 1
        del search.seconds[tile]
        report.add_fault(f'{job}, {tile}: {comparison}')
    else:
        return
    if search.best not in found or found[search.best] > 1.01 * found[tile]:
        search.best = tile
        search.frontier = [other for other in neighbors(tile) if other not in search.seen]


def _finish(search: Search, settings: Settings) -> None:
    """Store and print the result of a search."""
    job, seconds = search.job, search.seconds.get(search.best)
    if seconds is None:
        say(f'{job}: no tile could be timed')
        return
    default = search.seconds.get(job.default())
    gpu_run.store(settings, 'gpu_tiles', {
        'form': job.form, 'mode': MODE, 'batch': job.batch, 'channels': job.channels, 'height': job.height,
        'width': job.width, 'kernel': job.kernel, 'tile': dataclasses.asdict(search.best), 'seconds': seconds,
        'default_seconds': default, 'timed': len(search.seconds), 'failed': search.failed,
    })
    against = 'the default fails' if default is None else f'{default / seconds:.2f} x the default'
    say(f'{job}: {seconds * 1e6:.1f} us, {against}, {len(search.seconds)} timed, {search.failed} failed: {search.best}')
    say(*settings.predictions.lines(seconds, form=job.form, height=job.height, width=job.width, kernel=job.kernel))


# --- the file ---


def path_of(configs: Path, device: torch.device) -> Path:
    return configs / f'sm_{tuning._capability(device)}.json'


def _entries(path: Path) -> List[Dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else []


def _key(entry: Dict[str, Any]) -> Tuple[Any, ...]:
    size = tuple(entry['kernel_size'])
    return entry['kernel'], entry['mode'], entry['batch'], entry['height'], entry['width'], size


def configured(configs: Path, job: Job, device: torch.device) -> List[Any]:
    """Return the tile that a file of configs has for a job, if any."""
    return [
        tuning.TILES[job.form](**entry['tile'])
        for entry in _entries(path_of(configs, device)) if _key(entry) == job.key()]


def write(configs: Path, searches: List[Search], device: torch.device) -> None:
    """Replace the entries of the searches; a job whose default is as fast has none."""
    path = path_of(configs, device)
    measured = {search.job.key(): search for search in searches if search.seconds}
    entries = [entry for entry in _entries(path) if _key(entry) not in measured]
    entries += [_entry(search, device) for search in measured.values() if search.is_better()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_io.atomic_write(path) as temporary:
        temporary.write_text('[\n' + ',\n'.join(map(_text, entries)) + '\n]\n' if entries else '[]\n')


def _entry(search: Search, device: torch.device) -> Dict[str, Any]:
    job, default = search.job, search.seconds.get(search.job.default())
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else 'a dry run'
    source = f'measured on {name}, {date.today():%B %Y}: {search.seconds[search.best] * 1e6:.0f} us for ' \
        f'{job.channels} channels; ' + ('the default fails' if default is None else f'{default * 1e6:.0f} by default')
    return {
        'kernel': job.form, 'mode': MODE, 'batch': job.batch, 'height': job.height, 'width': job.width,
        'kernel_size': [job.kernel, job.kernel], 'tile': dataclasses.asdict(search.best), 'source': source}


def _text(entry: Dict[str, Any]) -> str:
    """Return an entry on three lines: what it is for, the tile, the source."""
    problem = {key: value for key, value in entry.items() if key not in ('tile', 'source')}
    return (
        f'  {json.dumps(problem)[:-1]},\n'
        f'   "tile": {json.dumps(entry["tile"])},\n'
        f'   "source": {json.dumps(entry["source"])}}}')
