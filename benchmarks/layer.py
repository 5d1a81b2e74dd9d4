"""Functions to time for one layer: the operation by several backends, and its four results."""
from typing import Callable, Dict, Sequence, Tuple

import torch
import torch.nn.functional as F
from cases import Case
from torch import Tensor

import smpconv_models

Operation = Callable[[Tensor, Tensor], Tensor]
Functions = Dict[str, Callable[[], Tuple[Tensor, ...]]]

# Results of the function of each name.
RETURNED = {'y': ('y',), 'dx': ('dx',), 'dw': ('dw',), 'all': ('y', 'dx', 'dw')}
FORMATS = {'nchw': torch.contiguous_format, 'nhwc': torch.channels_last}


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=x.shape[1])


def operations(backends: Sequence[str]) -> Dict[str, Operation]:
    """Return plain conv2d, and depthwise_conv2d with backend 'auto' and the given ones."""
    def ours(backend: str) -> Operation:
        return lambda x, weight: smpconv_models.depthwise_conv2d(x, weight, backend=backend)
    return {'plain': plain, **{backend: ours(backend) for backend in ('auto', *backends)}}


def make_inputs(case: Case, batch: int, dtype: torch.dtype, device: torch.device) -> Tuple[Tensor, Tensor, Tensor]:
    """Return x, weight and the gradient of y: standard normals, NCHW."""
    image, kernel = (batch, case.channels, case.height, case.width), (case.channels, 1, case.kernel, case.kernel)
    x, weight, grad = (torch.randn(shape, device=device).to(dtype) for shape in (image, kernel, image))
    return x, weight, grad


def paths(backends: Sequence[str], x: Tensor, weight: Tensor, grad: Tensor) -> Dict[str, Functions]:
    """Return the functions of every operation in every layout, by 'operation/layout'; plain comes first."""
    return {
        f'{name}/{layout}': functions(
            operation, x.contiguous(memory_format=memory), weight, grad.contiguous(memory_format=memory))
        for name, operation in operations(backends).items()
        for layout, memory in FORMATS.items()
    }


def functions(operation: Operation, x: Tensor, weight: Tensor, grad: Tensor) -> Functions:
    """Return functions that compute their results at each call; dx and dw are backward passes of a stored forward."""
    x_leaf, weight_leaf = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y_of_x, y_of_weight = operation(x_leaf, weight), operation(x, weight_leaf)

    def forward() -> Tuple[Tensor, ...]:
        with torch.no_grad():
            return (operation(x, weight),)

    def everything() -> Tuple[Tensor, ...]:
        y = operation(x_leaf, weight_leaf)
        return (y, *torch.autograd.grad(y, (x_leaf, weight_leaf), grad))

    return {
        'y': forward,
        'dx': lambda: torch.autograd.grad(y_of_x, x_leaf, grad, retain_graph=True),
        'dw': lambda: torch.autograd.grad(y_of_weight, weight_leaf, grad, retain_graph=True),
        'all': everything,
    }
