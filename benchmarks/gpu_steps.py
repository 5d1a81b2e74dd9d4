"""Time training steps of whole networks, and their kernels by category. Rows go to gpu_steps.jsonl.

bfloat16 autocast and channels_last, eager and compiled. Idle is the step without the kernels: time in which the device
waits for Python. The step is timed twice; differences between networks below that of the two times are noise.
"""
from typing import Any, Dict, List, NamedTuple, Optional

import ceilings
import gpu_run
import kernel_times
import measure
import timm
import torch
import training_step
from check import WrongResultError
from gpu_run import Report, Settings, say
from torch import nn

import smpconv_models  # noqa: F401 (registers the models with timm)


class Case(NamedTuple):
    network: str
    compiled: bool = False
    is_plain: bool = False  # with F.conv2d in place of depthwise_conv2d

    @property
    def variant(self) -> str:
        """Network and its convolution."""
        return f'{self.network}{", F.conv2d" * self.is_plain}'

    @property
    def name(self) -> str:
        return f'{self.variant}{", compiled" * self.compiled}'


NETWORKS = ('smpconv_t', 'convnext_tiny', 'inception_next_tiny', 'smpconv_b')
CASES = (
    *(Case(network) for network in NETWORKS), Case('smpconv_t', is_plain=True),
    *(Case(network, compiled=True) for network in NETWORKS),
)
DRY_CASES = (Case('smpconv_nano'), Case('test_resnet', compiled=True))
BATCH = 64
_FIRST = {'eager': 30., 'compiled': 120.}  # seconds that the first case of its kind may take
_NOTHING_BUILT = 'eager'  # backend of torch.compile in a dry run


def run(settings: Settings) -> Report:
    report = Report()
    torch.backends.cudnn.benchmark = True
    if not settings.is_dry:
        try:
            training_step.check_gradients(training_step.make_networks(settings.device), settings.device)
        except (RuntimeError, WrongResultError) as error:
            report.add_fault(gpu_run.error_line(error))
    for case in DRY_CASES if settings.is_dry else CASES:
        kind = 'compiled' if case.compiled else 'eager'
        if not settings.is_dry and not settings.deadline.allows(kind, _FIRST[kind]):
            report.left_out.append(case.name)
            continue
        try:
            with settings.deadline.timed(kind):
                row = _measure(case, settings)
        except RuntimeError as error:  # of PyTorch, Triton's launch and torch.compile
            report.add_fault(f'{case.name}: {gpu_run.error_line(error)}')
            continue
        gpu_run.store(settings, 'gpu_steps', row)
        say(*_lines(case, row), *_beside_predictions(row, settings))
    return report


def _measure(case: Case, settings: Settings) -> Dict[str, Any]:
    device, is_dry = settings.device, settings.is_dry
    batch, size = (2, 32) if is_dry else (BATCH, 224)
    torch._dynamo.reset()
    if device.type == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    network = _make_network(case, device)
    images, labels = training_step.random_images(batch, device, size)
    call = torch.compile(network, backend=_NOTHING_BUILT if is_dry else 'inductor') if case.compiled else network
    step = training_step.make_step(network, images, labels, call)
    before = settings.deadline.left()
    step()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    first = before - settings.deadline.left()
    for _ in range(0 if is_dry else 5):  # cuDNN's choice of algorithms, and the allocator
        step()
    peak = _peak_bytes(device)  # before the timing, whose stopwatch holds memory of its own
    rounds, seconds = (1, 0.1) if is_dry else (31, 4.)
    once, again = (measure.interleaved({'step': step}, rounds, seconds, device)['step'] for _ in range(2))
    clock = ceilings.clock(device)
    kernels = kernel_times.measured(step, network, device, case.compiled, steps=1 if is_dry else 2)
    busy = sum(kernels['kernel_seconds'].values())
    return {
        'network': case.variant, 'compiled': case.compiled, 'batch': batch, 'img_size': size, 'layout': 'channels_last',
        'dtype': 'bfloat16 autocast' if device.type == 'cuda' else 'float32', 'optimizer': 'adamw',
        'seconds': once, 'seconds_again': again, 'first_seconds': first, 'idle_seconds': max(once - busy, 0.),
        **kernels, 'clock': clock, 'peak_bytes': peak,
    }


def _peak_bytes(device: torch.device) -> Optional[int]:
    return torch.cuda.max_memory_allocated(device) if device.type == 'cuda' else None


def _make_network(case: Case, device: torch.device) -> nn.Module:
    """Create a network without stochastic depth, which would vary the amount of work."""
    network = timm.create_model(case.network, drop_path_rate=0., device=device)
    if case.is_plain:
        network = training_step.with_plain_convolutions(network)
    return network.train().to(memory_format=torch.channels_last)


def _lines(case: Case, row: Dict[str, Any]) -> List[str]:
    seconds, again = row['seconds'], row['seconds_again']
    lines = [
        f'{case.name}: {seconds * 1e3:.2f} ms, again {again * 1e3:.2f} ms, '
        f'{row["batch"] / seconds:.0f} images/s, first step {row["first_seconds"]:.0f} s']
    for category, value in sorted(row['kernel_seconds'].items(), key=lambda item: -item[1]):
        lines.append(f'    {category:40} {value * 1e3:8.3f} ms {row["launches"][category]:7.0f} launches')
    return [*lines, f'    {"idle":40} {row["idle_seconds"] * 1e3:8.3f} ms']


def _beside_predictions(row: Dict[str, Any], settings: Settings) -> List[str]:
    dtype = row['dtype'].partition(' ')[0]  # without autocast
    named = {'network': row['network'], 'compiled': row['compiled'], 'dtype': dtype}
    times = {**row['kernel_seconds'], 'idle': row['idle_seconds']}
    lines = settings.predictions.lines(row['seconds'], **named)
    for category, seconds in times.items():
        lines += settings.predictions.lines(seconds, **named, category=category)
    return lines
