"""Check of functions against float64 before they are timed."""
import math
from typing import Dict, Iterator, NamedTuple, Tuple

import torch
from layer import RETURNED, Functions, plain
from torch import Tensor

CHANNELS = 8
LOOSEST = 0.05  # a larger relative error is a wrong result at any precision
TF32_EPS = 2 ** -10  # products of 11 bits

Errors = Dict[str, float]  # by result


class WrongResultError(Exception):
    """A function to be timed has a wrong result."""


class Comparison(NamedTuple):
    """Error of a result against float64, and its limit."""
    path: str
    result: str
    error: float
    limit: float

    @property
    def is_right(self) -> bool:
        return self.error <= self.limit  # not for NaN

    def __str__(self) -> str:
        state = 'right' if self.is_right else 'wrong'
        return f'{self.result} of {self.path} is {state}: relative error {self.error:.1e}, limit {self.limit:.1e}'


class Exact:
    """Results in float64, of a few evenly spaced channels.

    The channels of a depthwise convolution are independent. The functions compute all channels, and every element must
    be finite.
    """

    def __init__(self, x: Tensor, weight: Tensor, grad: Tensor) -> None:
        self._channels = torch.linspace(0, len(weight) - 1, min(CHANNELS, len(weight)), device=x.device).round().long()
        operands = (x[:, self._channels], weight[self._channels], grad[:, self._channels])
        self._results = _exact(*(tensor.detach().contiguous().double() for tensor in operands))

    def error(self, result: str, tensor: Tensor) -> float:
        """Return the relative error in the Frobenius norm, NaN if any element is not finite."""
        given = tensor.detach().index_select(0 if result == 'dw' else 1, self._channels).double()
        return relative_error(given, self._results[result]) if tensor.isfinite().all() else math.nan


def check(paths: Dict[str, Functions], x: Tensor, weight: Tensor, grad: Tensor) -> Dict[str, Errors]:
    """Call every function and return the largest error of each path in y, dx and dw.

    Raises:
        WrongResultError: If an error is above its limit, or NaN.
    """
    errors: Dict[str, Errors] = {path: {} for path in paths}
    for comparison in compare(paths, x, weight, grad):
        if not comparison.is_right:
            raise WrongResultError(str(comparison))
        path, result, error, _ = comparison
        errors[path][result] = max(errors[path].get(result, 0.), error)
    return errors


def compare(paths: Dict[str, Functions], x: Tensor, weight: Tensor, grad: Tensor) -> Iterator[Comparison]:
    """Call every function and yield the error of each of its results; an iteration calls the next."""
    exact = Exact(x, weight, grad)
    of_plain: Errors = {}
    for path, functions in paths.items():
        limits = _plain_limits(x, weight) if path.startswith('plain/') else limits_beside(of_plain, x, weight)
        for name, function in functions.items():
            poison(x, weight)
            for result, tensor in zip(RETURNED[name], function()):
                comparison = Comparison(path, result, exact.error(result, tensor), limits[result])
                if path.startswith('plain/') and comparison.is_right:
                    of_plain[result] = max(of_plain.get(result, 0.), comparison.error)
                yield comparison


def relative_error(given: Tensor, exact: Tensor) -> float:
    return ((given - exact).norm() / exact.norm()).item()


def _exact(x: Tensor, weight: Tensor, grad: Tensor) -> Dict[str, Tensor]:
    x.requires_grad_()
    weight.requires_grad_()
    y = plain(x, weight)
    return dict(zip(RETURNED['all'], (y.detach(), *torch.autograd.grad(y, (x, weight), grad))))


def limits_beside(of_plain: Errors, x: Tensor, weight: Tensor) -> Errors:
    """Return the limit of the relative error of each result of this package.

    A sum of n products of standard normals is about sqrt(n). The rounding errors of its partial sums, a random walk,
    add up to less than n * eps, which is sqrt(n) * eps of the sum. This package's backends accumulate in float32 and
    round to the dtype at the end, by a quarter of its eps on average. One eps leaves room for a few partial results of
    that dtype. Plain conv2d may accumulate in the dtype itself, as its dx in float16 does on CPUs. Then the limit is
    twice the error of conv2d.

    Args:
        of_plain: Errors of plain conv2d by result, empty if unknown.
    """
    eps, accumulator_eps = _eps(x), torch.finfo(torch.float32).eps
    return {
        result: max(eps + accumulator_eps * n ** 0.5, 2 * of_plain.get(result, 0.))
        for result, n in _terms(x, weight).items()
    }


def _plain_limits(x: Tensor, weight: Tensor) -> Errors:
    eps = _eps(x)
    return {result: min(eps + eps * n ** 0.5, LOOSEST) for result, n in _terms(x, weight).items()}


def _eps(x: Tensor) -> float:
    is_tf32 = x.is_cuda and x.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == 'tf32'
    return TF32_EPS if is_tf32 else torch.finfo(x.dtype).eps


def _terms(x: Tensor, weight: Tensor) -> Dict[str, int]:
    """Return how many products are summed in one element of each result."""
    return {'y': weight[0].numel(), 'dx': weight[0].numel(), 'dw': x[:, 0].numel()}


def poison(*tensors: Tensor) -> None:
    """Fill memory with NaN before it is reused, so that an unwritten element cannot hold an earlier correct result."""
    held: Tuple[Tensor, ...] = tuple(torch.full_like(tensor, math.nan) for tensor in tensors * 2)
    del held
