"""Check of functions against float64 before they are timed."""
import math
from typing import Dict, Iterator, Tuple

import torch
from layer import RETURNED, Functions, plain
from torch import Tensor

CHANNELS = 8
LOOSEST = 0.05  # a larger relative error is a wrong result at any precision

Errors = Dict[str, float]  # by result


class WrongResultError(Exception):
    """A function to be timed has a wrong result."""


def check(paths: Dict[str, Functions], x: Tensor, weight: Tensor, grad: Tensor) -> Dict[str, Errors]:
    """Call every function and return the largest error of each path in y, dx and dw.

    Errors are relative, in the Frobenius norm. The exact result is computed for a few evenly spaced channels, because
    the channels of a depthwise convolution are independent. The functions compute all channels, and every element must
    be finite.

    Raises:
        WrongResultError: If an error is above its limit, or NaN.
    """
    channels = torch.linspace(0, len(weight) - 1, min(CHANNELS, len(weight)), device=x.device).round().long()
    exact = _exact(x[:, channels].double(), weight[channels].double(), grad[:, channels].double())
    errors: Dict[str, Errors] = {}
    for path, functions in paths.items():
        errors[path] = dict.fromkeys(exact, 0.)
        limits = _limits(path, errors, x, weight)
        for name, function in functions.items():
            _poison(x, weight)
            for result, tensor in zip(RETURNED[name], function()):
                given = tensor.detach().index_select(0 if result == 'dw' else 1, channels).double()
                error = relative_error(given, exact[result]) if tensor.isfinite().all() else math.nan
                if not error <= limits[result]:  # also for NaN
                    raise WrongResultError(
                        f'{result} of {path} is wrong: relative error {error:.1e}, limit {limits[result]:.1e}')
                errors[path][result] = max(errors[path][result], error)
    return errors


def relative_error(given: Tensor, exact: Tensor) -> float:
    return ((given - exact).norm() / exact.norm()).item()


def _exact(x: Tensor, weight: Tensor, grad: Tensor) -> Dict[str, Tensor]:
    x.requires_grad_()
    weight.requires_grad_()
    y = plain(x, weight)
    return dict(zip(RETURNED['all'], (y.detach(), *torch.autograd.grad(y, (x, weight), grad))))


def _limits(path: str, errors: Dict[str, Errors], x: Tensor, weight: Tensor) -> Errors:
    """Return the limit of the relative error of each result.

    A sum of n products of standard normals is about sqrt(n). The rounding errors of its partial sums, a random walk,
    add up to less than n * eps, which is sqrt(n) * eps of the sum. This package's backends accumulate in float32 and
    round to the dtype at the end, by a quarter of its eps on average. One eps leaves room for a few partial results of
    that dtype. Plain conv2d may accumulate in the dtype itself, as its dx in float16 does on CPUs. Then the limit is
    twice the error of conv2d.
    """
    eps, accumulator_eps = torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps
    terms = {'y': weight[0].numel(), 'dx': weight[0].numel(), 'dw': x[:, 0].numel()}
    if path.startswith('plain/'):
        return {result: min(eps + eps * n ** 0.5, LOOSEST) for result, n in terms.items()}
    return {
        result: max(eps + accumulator_eps * n ** 0.5, *(2 * error for error in _of_plain(errors, result)))
        for result, n in terms.items()
    }


def _of_plain(errors: Dict[str, Errors], result: str) -> Iterator[float]:
    return (by_result[result] for path, by_result in errors.items() if path.startswith('plain/'))


def _poison(*tensors: Tensor) -> None:
    """Fill memory with NaN before it is reused, so that an unwritten element cannot hold an earlier correct result."""
    held: Tuple[Tensor, ...] = tuple(torch.full_like(tensor, math.nan) for tensor in tensors * 2)
    del held
