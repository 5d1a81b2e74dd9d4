"""Tune the tiles of the Triton kernels: from the default on, step by step to the fastest neighbor.

All neighbors of a round are built at the same time, one process per core, and checked there on one image. They are then
checked at the full size, and the right ones are timed in turn. A tile is accepted if it is faster than the default by
`MARGIN`, or the default is wrong. Accepted tiles are written after every round. Tiles that do not fit the device are
left out, as the package does not launch them.
"""
import dataclasses
import functools
import os
from datetime import date
from multiprocessing import TimeoutError, get_context
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Set, Tuple

import check
import gpu_run
import measure
import tile_configs
import torch
from cases import CASES
from gpu_run import Report, Settings, say
from limits import Deadline
from torch import Tensor
from tqdm import tqdm

from smpconv_models.ops._triton import launch, tuning

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
        """Return y (N, C, H, W), or the gradient of the weight (C, 1, kernel, kernel), in the dtype of the operands.

        Raises:
            RuntimeError: If the tile cannot be built or launched on the device; Triton's errors beside it.
        """
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

    def fits(self, tile: Any, device: torch.device) -> bool:
        """Return whether a device has the resources for a tile: without them, the package takes another."""
        limits = tuning._limits(device, tuning._capability(device))
        return tile.fits(limits, _TYPES[device.type].itemsize, self.width, self.kernel)

    def default(self, device: torch.device) -> Any:
        """Return the tile that the package takes on a device without a tuned one, None if no tile fits."""
        tile = tuning._DEFAULTS[self.form](self.batch, self.height, self.width, [self.kernel, self.kernel], MODE)
        while tile is not None and not self.fits(tile, device):
            tile = tile.smaller()
        return tile

    def key(self) -> tile_configs.Key:
        """Return what identifies the job in a file of tuned tiles: all but the number of channels."""
        return self.form, MODE, self.batch, self.height, self.width, (self.kernel, self.kernel)


@dataclasses.dataclass
class Search:
    """State of the search for one job.

    Attributes:
        job: What is tuned.
        device: Device of the search.
        default: Tile that the package takes without a tuned one.
        frontier: Tiles to build and time in the next round; the search has ended if there are none.
        best: Fastest tile that is right at the full size; the default at first.
        seconds: Times of the tiles that are right at the full size.
        seen: Tiles that were in a frontier.
        failed: Number of tiles that cannot be built or are wrong.
    """
    job: Job
    device: torch.device
    default: Any
    frontier: List[Any]
    best: Any
    seconds: Dict[Any, float] = dataclasses.field(default_factory=dict)
    seen: Set[Any] = dataclasses.field(default_factory=set)
    failed: int = 0

    @classmethod
    def start(cls, job: Job, configured: List[Any], device: torch.device) -> Optional['Search']:
        """Return a search from the default and the configured tiles on, None if no tile fits the device."""
        default = job.default(device)
        if default is None:
            return None
        search = cls(job, device, default, [], default)
        search.look_at([default, *configured, *neighbors(default)])
        return search

    def look_at(self, tiles: Iterable[Any]) -> None:
        """Set the frontier to those of the tiles that are new and fit the device."""
        self.frontier = [
            tile for tile in dict.fromkeys(tiles) if tile not in self.seen and self.job.fits(tile, self.device)]
        self.seen.update(self.frontier)

    def is_better(self) -> bool:
        """Return whether the best tile is faster than the default by ``MARGIN``, or the default failed."""
        default = self.seconds.get(self.default)
        return self.best in self.seconds and (default is None or default > MARGIN * self.seconds[self.best])

    def entry(self) -> tile_configs.Entry:
        """Return the best tile as an entry of a file of tuned tiles."""
        job, default, device = self.job, self.seconds.get(self.default), self.device
        name = torch.cuda.get_device_name(device) if device.type == 'cuda' else 'a dry run'
        against = 'the default fails' if default is None else f'{default * 1e6:.0f} by default'
        return {
            'kernel': job.form, 'mode': MODE, 'batch': job.batch, 'height': job.height, 'width': job.width,
            'kernel_size': [job.kernel, job.kernel], 'tile': dataclasses.asdict(self.best),
            'source': f'measured on {name}, {date.today():%B %Y}: {self.seconds[self.best] * 1e6:.0f} us for '
                      f'{job.channels} channels; {against}'}


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


def _selected_forms(batch: int, height: int, width: int, kernel: int, device: torch.device) -> List[str]:
    """Return the forms for devices of any kind, and before them those for this device."""
    capability, aligned = tuning._capability(device), tuning.alignment(width)
    forms = [tuning.forward_form(height, width), tuning.weight_grad_form(height, width)]
    if tuning.fits_hopper_grad(height, width, MODE, capability, aligned):
        forms.insert(0, 'hopper_map_weight_grad')
    if tuning.fits_hopper_small_grad(height, width, MODE, capability):
        forms.insert(0, 'hopper_small_map_weight_grad')
    if tuning.fits_hopper_block_grad(batch, width, [kernel, kernel], MODE, capability, aligned):
        forms.insert(0, 'hopper_block_weight_grad')
    if tuning.fits_hopper_map(batch, height, width, [kernel, kernel], MODE, capability, aligned):
        forms.insert(0, 'hopper_map_forward')
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
    path = tile_configs.path_of(settings.configs, device)
    started = {
        job: Search.start(job, tile_configs.tiles(path, job.key()), device) for job in jobs(settings.is_dry, device)}
    say(*(f'{job}: no tile fits the device' for job, search in started.items() if search is None))
    searches = [search for search in started.values() if search is not None]
    active = list(searches)
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
            write(path, searches)
            active = [search for search in active if search.frontier]
    for search in active:  # ended by the time, each with the best tile so far
        if not search.seconds:
            report.left_out.append(str(search.job))
        _finish(search, settings)
    return report


def write(path: Path, searches: List[Search]) -> None:
    """Replace the entries of the searches in a file of tuned tiles; a job whose default is as fast has none."""
    measured = [search for search in searches if search.seconds]
    tile_configs.replace(
        path, {search.job.key() for search in measured}, [search.entry() for search in measured if search.is_better()])


def _build(active: List[Search], pool: Pool, settings: Settings, report: Report) -> Dict[Job, List[Any]]:
    """Build and check the tiles of all frontiers; return those that are right, by job."""
    pending = []
    for search in active:
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
        if tile == search.default:
            report.add_fault(f'{search.job}, default {tile}: {reason}')
    return right


def _try(job: Job, tile: Any, device: torch.device) -> Optional[str]:
    """Build a tile into Triton's cache and run it; return why it is of no use."""
    def compare() -> check.Comparison:
        operands = job.operands(device, is_small=True)
        return job.comparison(operands, check.Exact(*operands), tile)
    return _reason_against(compare)


def _reason_against(compare: Callable[[], check.Comparison]) -> Optional[str]:
    """Return why a comparison fails or its result is wrong, None if the result is right."""
    from triton.errors import TritonError
    try:
        comparison = compare()
    except (AssertionError, RuntimeError, ValueError, TritonError) as error:  # too large, or not a kernel's tile
        return gpu_run.error_line(error)
    return None if comparison.is_right else str(comparison)


def _advance(search: Search, tiles: List[Any], settings: Settings, report: Report) -> None:
    """Check tiles at the full size, time the right ones beside the best one, and move to the fastest."""
    search.frontier = []
    job = search.job
    operands = job.operands(settings.device)
    exact = check.Exact(*operands)
    functions: Dict[Any, Callable[[], Tensor]] = {}
    for tile in dict.fromkeys([*([search.best] if search.best in search.seconds else []), *tiles]):
        reason = _reason_against(functools.partial(job.comparison, operands, exact, tile))
        if reason is None:
            functions[tile] = lambda tile=tile: job.run(operands, tile)
        else:
            search.failed += 1
            search.seconds.pop(tile, None)
            report.add_fault(f'{job}, {tile}: {reason}')
    rounds, seconds = (1, 0.01) if settings.is_dry else (21, 0.1)
    try:
        found = measure.interleaved(functions, rounds, seconds, settings.device)
    except RuntimeError as error:
        report.add_fault(f'{job}: {gpu_run.error_line(error)}')
        return
    search.seconds.update(found)
    if not found:
        return
    fastest = min(found, key=found.__getitem__)
    if search.best not in found or found[search.best] > 1.01 * found[fastest]:
        search.best = fastest
        search.look_at(neighbors(fastest))


def _finish(search: Search, settings: Settings) -> None:
    """Store and print the result of a search."""
    job, seconds = search.job, search.seconds.get(search.best)
    if seconds is None:
        say(f'{job}: no tile was built and found right')
        return
    default = search.seconds.get(search.default)
    gpu_run.store(settings, 'gpu_tiles', {
        'form': job.form, 'mode': MODE, 'batch': job.batch, 'channels': job.channels, 'height': job.height,
        'width': job.width, 'kernel': job.kernel, 'tile': dataclasses.asdict(search.best), 'seconds': seconds,
        'default_seconds': default, 'timed': len(search.seconds), 'failed': search.failed,
    })
    against = 'the default fails' if default is None else f'{default / seconds:.2f} x the default'
    say(f'{job}: {seconds * 1e6:.1f} us, {against}, {len(search.seconds)} timed, {search.failed} failed: {search.best}')
    say(*settings.predictions.lines(
        seconds, form=job.form, height=job.height, width=job.width, kernel=job.kernel,
        dtype=str(_TYPES[search.device.type]).removeprefix('torch.')))
