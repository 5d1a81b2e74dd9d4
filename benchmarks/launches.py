#!/usr/bin/env python3
"""Count the kernels of a training step, and the bytes that they read and write, without a GPU.

    python benchmarks/launches.py [--model smpconv_t] [--batch-size 64] [--plans eager compiled combined]
        [--output FILE]

The step is the forward and backward pass in bfloat16 autocast and channels_last, without an optimizer. `torch.compile`
traces it in one graph, and nothing is computed. The plans are:

    eager     each operator of the graph that is no view is one kernel. This is a lower bound, because an operator may
              launch several.
    compiled  the kernels into which PyTorch's inductor fuses the same graph for an NVIDIA H100.
    combined  the same with inductor's option `combo_kernels`, which joins small independent kernels.

Bytes count each operand and each result of a kernel once. Categories are those of kernel_times.py. A fused kernel
counts as a norm if any part of a norm is in it. With --output, rows are appended to the file.
"""
import argparse
import math
import sys
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterable, Iterator, List, Tuple
from unittest import mock

import measure
import timm
import torch
import torch._functorch.config
import torch._inductor.config
import training_step
from arguments import Parser, positive
from kernel_times import COPIES, DEPTHWISE, ELEMENTWISE, NORMS, PLAIN_DEPTHWISE, PRODUCTS, SAMPLING, is_depthwise_kernel
from torch import Tensor, nn
from torch._dynamo import device_interface
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import compile_fx, ir, scheduler
from torch._inductor.graph import GraphLowering
from torch.fx import GraphModule, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from smpconv_models.layers import SMPLayer

PLANS = ('eager', 'compiled', 'combined')
_WITHOUT_KERNEL = {'getitem', '_unsafe_view', 'empty', 'empty_like', 'new_empty', 'detach'}

Count = Tuple[str, int]  # category and bytes of a kernel


class _Planned(Exception):
    """Raised in place of running a planned step."""


# --- plans ---


def plan(network: nn.Module, batch: int, size: int, name: str) -> Dict[str, Dict[str, int]]:
    """Return launches and bytes of a step by category, with the sums of all categories under 'all'."""
    images, labels = training_step.random_images(batch, torch.device('cpu'), size)
    kernels: List[Count] = []

    def step(images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast('cpu', torch.bfloat16):
            return nn.functional.cross_entropy(network(images), labels)

    with ExitStack() as stack:
        stack.enter_context(torch._functorch.config.patch(
            force_non_lazy_backward_lowering=True, enable_autograd_cache=False, cse=name != 'eager'))
        if name == 'eager':
            backend = _operators(kernels)
        else:
            stack.enter_context(torch._inductor.config.patch(
                fx_graph_cache=False, combo_kernels=name == 'combined', combo_kernels_autotune=0))
            stack.enter_context(_planning_for_cuda(kernels))
            backend = _fused
        torch.compiler.reset()
        with suppress(_Planned):
            torch.compile(step, backend=backend, fullgraph=True)(images, labels)
    return _by_category(kernels)


def _by_category(kernels: Iterable[Count]) -> Dict[str, Dict[str, int]]:
    launches: Counter = Counter()
    moved: Counter = Counter()
    for category, size in kernels:
        for key in (category, 'all'):
            launches[key] += 1
            moved[key] += size
    return {'launches': dict(launches), 'bytes': dict(moved)}


def _not_run(*args: Any) -> None:
    raise _Planned


# --- operators of the graph ---


def _operators(kernels: List[Count]) -> Callable[..., Any]:
    """Return a backend of torch.compile that counts the operators of the forward and of the backward graph."""
    def compiler(graph: GraphModule, inputs: Any) -> Callable[..., Any]:
        for node in graph.graph.nodes:
            if node.op == 'call_function' and _has_kernel(node):
                kernels.append((category(node), _node_bytes(node)))
        return _not_run

    return aot_autograd(fw_compiler=compiler, bw_compiler=compiler)


def _has_kernel(node: Node) -> bool:
    return not (_operator(node) in _WITHOUT_KERNEL or getattr(node.target, 'is_view', False))


def _operator(node: Node) -> str:
    packet = getattr(node.target, 'overloadpacket', node.target)
    return packet.__name__  # type: ignore[union-attr]


def category(node: Node) -> str:
    """Return the category of an operator, by its module in the network and its name."""
    name = _operator(node)
    modules = node.meta.get('nn_module_stack') or node.meta.get('fwd_nn_module_stack') or {}
    module = next((kind for _, kind in reversed(modules.values())), None)
    if name.startswith('depthwise_conv2d'):
        return DEPTHWISE
    if isinstance(module, type) and issubclass(module, SMPLayer):
        return SAMPLING
    if name.startswith('convolution'):
        weight = node.args[1 if name == 'convolution' else 2].meta['val']  # type: ignore[union-attr]
        return PLAIN_DEPTHWISE if is_depthwise_kernel(weight.shape) else PRODUCTS
    if name in ('mm', 'addmm', 'bmm'):
        return PRODUCTS
    if 'batch_norm' in name or (isinstance(module, type) and issubclass(module, nn.modules.batchnorm._BatchNorm)):
        return NORMS
    if name in ('_to_copy', 'convert_element_type', 'clone', 'copy', 'copy_', 'cat'):
        return COPIES
    return ELEMENTWISE


def _node_bytes(node: Node) -> int:
    tensors = [other.meta.get('val') for other in node.all_input_nodes]
    results = node.meta.get('val')
    return sum(map(_tensor_bytes, [*tensors, *(results if isinstance(results, (list, tuple)) else [results])]))


def _tensor_bytes(tensor: Any) -> int:
    """Return the bytes of a tensor, of an expanded one those that exist."""
    if not isinstance(tensor, Tensor):
        return 0
    return tensor.element_size() * math.prod(size for size, stride in zip(tensor.shape, tensor.stride()) if stride)


# --- fused kernels ---


class _H100(device_interface.CudaInterface):
    """Properties of a GPU that inductor reads before it generates code."""

    properties = SimpleNamespace(
        name='NVIDIA H100', major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32, total_memory=80 * 2 ** 30)
    current_device = staticmethod(lambda: 0)
    get_device_properties = staticmethod(lambda device=None: _H100.properties)
    get_compute_capability = staticmethod(lambda device=None: 90)
    is_bf16_supported = staticmethod(lambda including_emulation=False: True)
    is_triton_capable = staticmethod(lambda device=None: True)
    raise_if_triton_unavailable = staticmethod(lambda device=None: None)


@contextmanager
def _planning_for_cuda(kernels: List[Count]) -> Iterator[None]:
    """Let inductor schedule for a GPU that need not exist, and count its kernels instead of building them."""
    def count(graph: GraphLowering) -> Any:
        graph.init_wrapper_code()
        graph._update_scheduler()
        kernels.extend(filter(None, map(_scheduled, graph.scheduler.nodes)))
        return SimpleNamespace(call=_not_run, __file__='')

    device_interface.get_interface_for_device('cpu')  # the first call registers the existing devices
    properties = staticmethod(lambda device=None: _H100.properties)
    with mock.patch.dict(device_interface.device_interfaces, {'cuda': _H100, 'cuda:0': _H100}), \
            mock.patch.object(torch.cuda, 'get_device_properties', properties), \
            mock.patch.object(torch.cuda, 'get_device_capability', lambda device=None: (9, 0)), \
            mock.patch.object(torch.cuda, 'current_device', lambda: 0), \
            mock.patch.object(scheduler, 'has_triton', lambda: True), \
            mock.patch.object(GraphLowering, 'compile_to_module', count):
        yield


def _fused(graph: GraphModule, inputs: Any) -> Any:
    """Compile by inductor, which gets the graphs of both passes as graphs on a GPU.

    They are traced on the CPU, because PyTorch's autograd runs on existing devices only.
    """
    def inner(graph: GraphModule, inputs: Any, **kwargs: Any) -> Any:
        mode = next(value.fake_mode for value in inputs if isinstance(value, Tensor))
        with mode:
            inputs = [
                torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device='cuda:0')
                if isinstance(value, Tensor) else value for value in inputs]
        for node in graph.graph.nodes:
            if node.kwargs.get('device') is not None:
                node.kwargs = {**node.kwargs, 'device': torch.device('cuda:0')}
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
        compile_fx.compile_fx_inner(graph, inputs, **kwargs)
        return _not_run

    return compile_fx.compile_fx(graph, inputs, inner_compile=inner)


def _scheduled(node: Any) -> Any:
    """Return category and bytes of a kernel of inductor; None if it is no kernel."""
    if isinstance(node, scheduler.NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput):
        return None
    origins = [
        origin for part in node.get_nodes() for origin in part.node.get_origins() if origin.op == 'call_function']
    if isinstance(node, scheduler.ExternKernelSchedulerNode):
        origins = [node.node.origin_node] if node.node.origin_node is not None else origins
    found = {category(origin) for origin in origins}
    order = (DEPTHWISE, PLAIN_DEPTHWISE, PRODUCTS) if node.is_extern() else ()
    kind = next((kind for kind in (*order, NORMS, ELEMENTWISE, SAMPLING, COPIES) if kind in found), ELEMENTWISE)
    return kind, node.get_read_write_buffers_sizes()


# --- command line ---


def text(row: Dict[str, Any]) -> str:
    lines = [f'{row["model"]}, batch {row["batch_size"]}, {row["plan"]}']
    launches, moved = row['launches'], row['bytes']
    for key in sorted(launches, key=lambda key: -launches[key]):
        lines.append(
            f'    {key:42} {launches[key]:6} launches {launches[key] / launches["all"]:6.1%}'
            f' {moved[key] / 1e9:9.3f} GB {moved[key] / moved["all"]:7.2%}')
    return '\n'.join(lines)


def main(argv: Any = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='smpconv_t')
    parser.add_argument('--batch-size', type=positive(int), default=64)
    parser.add_argument('--plans', nargs='+', choices=PLANS, default=PLANS)
    parser.add_argument('--output', type=Path)
    args = parser.parse_args(argv)
    network = timm.create_model(args.model).train().to(memory_format=torch.channels_last)
    for module in network.modules():
        if isinstance(module, timm.layers.DropPath):
            module.drop_prob = 0.
    for name in args.plans:
        row = {'model': args.model, 'batch_size': args.batch_size, 'plan': name}
        row.update(plan(network, args.batch_size, network.pretrained_cfg['input_size'][-1], name))
        print(text(row), flush=True)
        if args.output is not None:
            measure.append(args.output, row)
    return 0


if __name__ == '__main__':
    sys.exit(main())
