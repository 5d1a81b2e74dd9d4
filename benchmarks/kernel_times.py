"""Kernel time of a training step by category, from PyTorch's profiler.

A kernel belongs to the operator that launched it. Names of kernels alone cannot separate a depthwise convolution from
others, or the sampling of kernels from other elementwise work. In a compiled network the sampling is fused with other
work, and counts as that.
"""
from collections import Counter
from contextlib import ExitStack, contextmanager
from typing import Any, Callable, Dict, Iterable, Iterator, List, Set, Tuple

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from smpconv_models.layers import smp_layers

DEPTHWISE, DEPTHWISE_COPIES = 'depthwise_conv2d', 'copies by depthwise_conv2d'
PLAIN_DEPTHWISE, PRODUCTS = 'depthwise convolutions of PyTorch', 'other convolutions and matrix products'
NORMS, ELEMENTWISE, SAMPLING = 'norms', 'activations and other elementwise', 'sampling of kernels'
OPTIMIZER, COPIES, UNKNOWN = 'optimizer', 'copies and fills', 'without an operator'
CATEGORIES = (
    DEPTHWISE, DEPTHWISE_COPIES, PLAIN_DEPTHWISE, PRODUCTS, NORMS, ELEMENTWISE, SAMPLING, OPTIMIZER, COPIES, UNKNOWN)

_COPYING = {'aten::copy_', 'aten::clone', 'aten::contiguous', 'aten::fill_', 'aten::zero_', 'aten::cat'}
_MULTIPLYING = {'aten::mm', 'aten::addmm', 'aten::bmm', 'aten::baddbmm', 'aten::matmul', 'aten::linear'}
_LARGEST = 25  # kernels that a row names


def measured(
        step: Callable[[], None], network: nn.Module, device: torch.device, is_compiled: bool,
        steps: int = 2) -> Dict[str, Any]:
    """Profile some steps. Return the seconds and launches of one step by category, and the kernels that take longest.

    On a CPU, which launches nothing, the time of an operator without its callees is that of its kernel.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == 'cuda')
    with ExitStack() as stack:
        if not is_compiled:  # a changed layer would be compiled again
            stack.enter_context(_named_sampling(network))
        step()
        found = stack.enter_context(profile(activities=activities, record_shapes=True))
        for _ in range(steps):
            step()
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
    seconds: Counter = Counter()
    launches: Counter = Counter()
    for name, category, duration in _kernels(found.events(), device):
        seconds[name, category] += duration / steps
        launches[name, category] += 1

    def by_category(counter: Counter) -> Dict[str, float]:
        return {
            category: sum(value for (_, other), value in counter.items() if other == category)
            for category in CATEGORIES if any(other == category for _, other in counter)}

    return {
        'kernel_seconds': by_category(seconds),
        'launches': {category: count / steps for category, count in by_category(launches).items()},
        'kernels': [
            {'name': name[:160], 'category': category, 'seconds': value, 'launches': launches[name, category] / steps}
            for (name, category), value in seconds.most_common(_LARGEST)],
    }


@contextmanager
def _named_sampling(network: nn.Module) -> Iterator[None]:
    """Record the sampling of each kernel as a range of the profile."""
    layers = smp_layers(network).values()

    def recorded(kernel: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            with record_function(SAMPLING):
                return kernel()
        return call

    for layer in layers:
        layer.kernel = recorded(layer.kernel)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.kernel


def _kernels(events: Iterable[Any], device: torch.device) -> Iterator[Tuple[str, str, float]]:
    """Yield name, category and seconds of each kernel."""
    operators = [event for event in events if event.device_type == DeviceType.CPU and not event.is_async]
    sampled = _sequence_numbers(operators)
    ranges = {event.name for event in operators}
    attributed: Counter = Counter()
    for event in operators:
        callers = _callers(event)
        if device.type == 'cpu':
            yield event.name, _category(callers, event.name, sampled), event.self_cpu_time_total / 1e6
        for kernel in event.kernels:
            if kernel.name not in ranges:  # a range's extent on the device is no kernel
                attributed[kernel.name] += kernel.duration
                yield kernel.name, _category(callers, kernel.name, sampled), kernel.duration / 1e6
    for event in events:
        if event.device_type == DeviceType.CUDA and event.name not in ranges:
            attributed[event.name] -= event.time_range.elapsed_us()
    for name, missing in attributed.items():
        if missing < -1:
            yield name, UNKNOWN, -missing / 1e6


def _sequence_numbers(operators: Iterable[Any]) -> Set[Tuple[int, int]]:
    """Return the numbers, by thread, by which the backward passes of sampled kernels are found."""
    return {
        (event.sequence_nr, event.thread) for event in operators
        if event.sequence_nr >= 0 and any(caller.name == SAMPLING for caller in _callers(event))}


def _callers(event: Any) -> List[Any]:
    """Return an event and those that it is within, innermost first."""
    found = []
    while event is not None:
        found.append(event)
        event = event.cpu_parent
    return found


def _category(callers: List[Any], kernel: str, sampled: Set[Tuple[int, int]]) -> str:
    names = [caller.name for caller in callers]
    innermost = next((name for name in names if '::' in name), '')
    if SAMPLING in names or any((caller.sequence_nr, caller.fwd_thread) in sampled for caller in callers):
        return SAMPLING
    if any(name.startswith('Optimizer.') for name in names):
        return OPTIMIZER
    if any('smpconv_models' in name for name in names):
        return DEPTHWISE_COPIES if innermost in _COPYING else DEPTHWISE
    if any('conv' in name.lower() for name in names if not name.startswith('triton_')):  # of torch.compile
        shapes = [shape for caller in callers for shape in caller.input_shapes or ()]
        return PLAIN_DEPTHWISE if any(map(is_depthwise_kernel, shapes)) else PRODUCTS
    if not _MULTIPLYING.isdisjoint(names):
        return PRODUCTS
    if any('norm' in name.lower() for name in [*names, kernel]):
        return NORMS
    if innermost in _COPYING or kernel.startswith(('Memcpy', 'Memset')):
        return COPIES
    return ELEMENTWISE


def is_depthwise_kernel(shape: Any) -> bool:
    """Return whether a shape is that of a depthwise convolution's weight (C, 1, kh, kw), larger than 1x1."""
    return len(shape) == 4 and shape[1] == 1 and shape[2] * shape[3] > 1
