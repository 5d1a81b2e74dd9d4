"""FLOP counters that go by the type of a module: this package's layers enter the counter's own table of types."""
import sys
import warnings
from typing import Any, Callable

from torch import Tensor, nn


class CountedConv(nn.Module):
    """Convolution that thop and ptflops count like the ``nn.Conv1d`` or ``nn.Conv2d`` that it equals.

    Both walk a model by ``nn.Module.apply`` and look up the exact type of each module in a table.
    """

    def products_per_output(self: Any) -> int:
        """Return the number of products in one output element: input channels of a group times kernel elements."""
        return self.weight[0].numel()

    def apply(self, fn: Callable[[nn.Module], Any]) -> Any:
        counter = getattr(fn, '__module__', None)
        if counter in _TABLES:
            table, formula = _TABLES[counter]
            getattr(sys.modules[counter], table, {}).setdefault(type(self), formula)  # another version may have none
        return super().apply(fn)


def _count_for_thop(layer: Any, inputs: Any, output: Tensor) -> None:
    layer.total_ops += layer.products_per_output() * output.numel()


def _count_for_ptflops(layer: Any, inputs: Any, output: Tensor) -> None:
    has_bias = getattr(layer, 'bias', None) is not None  # which ptflops counts
    layer.__flops__ += (layer.products_per_output() + has_bias) * output.numel()


_TABLES = {
    'thop.profile': ('register_hooks', _count_for_thop),
    'ptflops.pytorch_engine': ('MODULES_MAPPING', _count_for_ptflops),
}

_BY_PARAMETERS = {
    'torchinfo.torchinfo':
        'torchinfo counts multiply-adds by the shapes of parameters, and points are fewer than kernel elements, so its '
        'total is too low',
    'torchsummary.torchsummary':
        'torchsummary counts the parameters "weight" and "bias" only, not the positions and radii of points',
}


def warn_of_parameter_counter(hook: Any) -> None:
    """Warn if a forward hook is of a tool that can't count a layer with points by the names of its parameters."""
    reason = _BY_PARAMETERS.get(getattr(hook, '__module__', ''))
    if reason is not None:
        warnings.warn(
            f'{reason}. Count timm.utils.reparameterize_model(model), or use another counter.', stacklevel=3)
