"""Convolutions whose kernels are as long as what they run over: the direct sum, or by fast Fourier transforms."""
import math
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_variadic

from smpconv_models.ops import has_autocast, is_counted, is_exporting

from .counted import CountedConv
from .fuse import upcast

METHODS = ('auto', 'direct', 'fft')

# On a CPU, forward and backward pass together, the FFT takes as long as so many products of the direct sum for each
# element of a signal's transform, of a kernel's, and for each product of the two: fitted to 67 convolutions with 2
# threads (AVX2), of which it chooses 63 right, and of the others none that is more than 1.5 times as slow.
# benchmarks/long_conv.py repeats them.
_OF_SIGNALS, _OF_KERNELS, _OF_PRODUCTS = 120, 250, 3

# On other devices nothing was measured. The original release takes the FFT for sequences of 784 and more, not for 182
# and less, and never for images.
_FFT_FROM = 256


def causal_conv1d(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None, method: str = 'auto') -> Tensor:
    """``y[n, o, t] = bias[o] + sum over c, s of weight[o, c, k - 1 - s] * x[n, c, t - s]``, zero before the beginning.

    Equal to ``F.conv1d(F.pad(x, (k - 1, 0)), weight, bias)``; equation 3 of the paper, cut off at the present. One leaf
    for fx.

    Args:
        x: ``(N, C, L)``.
        weight: ``(O, C, k)``, the last element for the present; k may exceed L.
        bias: ``(O,)``.
        method: 'direct', 'fft', or 'auto': whichever is quicker by what was measured on a CPU; on other devices the FFT
            for kernels of 256 elements and more. 'auto' is 'direct' where it is scripted, traced or exported,
            and while a FLOP counter runs.

    Returns:
        ``(N, O, L)`` in the dtype of a convolution. The FFT is computed in float32 at least; its rounding errors are
        relative to the largest values of the sequence, not to each output's own. So they reach the past too, and a NaN
        or infinity at any step is one at all of them. It has no forward-mode derivatives, which 'direct' has.

    Raises:
        ValueError: Unknown ``method``, shapes that don't fit, or 'fft' where it can't be: scripted, traced, of numbers
            that aren't real.
    """
    if has_torch_function_variadic(x, weight):
        return handle_torch_function(causal_conv1d, (x, weight), x, weight, bias, method)
    left = [weight.shape[2] - 1]
    if _takes_fft(method, x, weight, bias, left) and x.shape[0] > 0:  # which FFTs don't take
        return _fft_conv(x, weight, bias, left)
    return F.conv1d(F.pad(x, [left[0], 0]), weight, bias)


def fft_conv2d(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None, method: str = 'auto') -> Tensor:
    """``F.conv2d(x, weight, bias, padding=(kh // 2, kw // 2))`` for odd kernels. One leaf for fx.

    Args:
        x: ``(N, C, H, W)``.
        weight: ``(O, C, kh, kw)``, both odd.
        bias: ``(O,)``.
        method: As in :func:`causal_conv1d`.

    Returns:
        ``(N, O, H, W)``; numerics as in :func:`causal_conv1d`.

    Raises:
        ValueError: An even kernel; else as :func:`causal_conv1d`.
    """
    if has_torch_function_variadic(x, weight):
        return handle_torch_function(fft_conv2d, (x, weight), x, weight, bias, method)
    if weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
        raise ValueError(f'expected a kernel of odd sizes, got {weight.shape[2]}x{weight.shape[3]}')
    left = [weight.shape[2] // 2, weight.shape[3] // 2]
    if _takes_fft(method, x, weight, bias, left) and x.shape[0] > 0:
        return _fft_conv(x, weight, bias, left)
    return F.conv2d(x, weight, bias, padding=(left[0], left[1]))


def check_method(method: str) -> None:
    """Raises ValueError unless there is such a method."""
    if method not in METHODS:
        raise ValueError(f'method must be one of {METHODS}, got {method!r}')


def _takes_fft(method: str, x: Tensor, weight: Tensor, bias: Optional[Tensor], left: List[int]) -> bool:
    if torch.jit.is_scripting() or torch.jit.is_tracing():
        if method == 'fft':
            raise ValueError("method 'fft' can't be scripted or traced: 'auto' and 'direct' can")
        return False
    _check(method, x, weight, bias)
    if method != 'auto':
        return method == 'fft'
    if is_exporting() or _is_counted():
        return False
    return _are_real(x, weight) and _is_quicker_by_fft(x, weight, left)


@torch.jit.unused
def _is_counted() -> bool:
    return is_counted()


def _are_real(x: Tensor, weight: Tensor) -> bool:
    return x.is_floating_point() and weight.is_floating_point()


def _check(method: str, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> None:
    check_method(method)
    if method == 'fft' and not _are_real(x, weight):
        raise ValueError(f"method 'fft' takes floating point numbers, got {x.dtype} and {weight.dtype}")
    if x.ndim != weight.ndim or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f'expected an input (N, C, ...) for a weight (O, C, ...) of the same C, got {tuple(x.shape)} and '
            f'{tuple(weight.shape)}')
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f'expected a bias {tuple(weight.shape[:1])}, got {tuple(bias.shape)}')


def _is_quicker_by_fft(x: Tensor, weight: Tensor, left: List[int]) -> bool:
    if x.device.type != 'cpu':
        return x.ndim == 3 and weight.shape[2] >= _FFT_FROM
    n, c, o = x.shape[0], x.shape[1], weight.shape[0]
    direct = n * c * o * math.prod(x.shape[2:]) * math.prod(weight.shape[2:])
    of_fft = _OF_SIGNALS * n * (c + o) + _OF_KERNELS * c * o + _OF_PRODUCTS * n * c * o
    return direct > of_fft * math.prod(_ring(x, weight, left))


@torch.jit.unused
def _fft_conv(x: Tensor, weight: Tensor, bias: Optional[Tensor], left: List[int]) -> Tensor:
    """A convolution with ``left`` zeros before each dimension and, behind, as many as make the output the input's size.
    """
    dtype = torch.promote_types(x.dtype, weight.dtype)
    device = x.device.type if has_autocast(x.device.type) else 'cpu'  # meta has none
    if torch.is_autocast_enabled(device):
        dtype = dtype if dtype == torch.float64 else torch.get_autocast_dtype(device)  # it leaves doubles alone
    elif x.dtype != weight.dtype:
        raise ValueError(f'expected an input and a weight of one type, got {x.dtype} and {weight.dtype}')
    y: Any = _FFTConv.apply(upcast(x), upcast(weight), left)
    if bias is not None:
        y = y + bias.view(-1, *[1] * len(left))
    return y.to(dtype)


class _FFTConv(torch.autograd.Function):
    """A convolution by FFT, forward and backward, that keeps its arguments for the latter and no spectra.

    On a ring that holds the input and the zeros before it, and the kernel: what goes round the end meets the zeros, or
    lands in elements that are cut off. What PyTorch would derive keeps padded copies and spectra of both, four times as
    much, and hands conjugate and transposed views on to the matrix products, which then go through the frequencies one
    after the other: 3 to 6 times as slow on a CPU.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, left: List[int]) -> Tensor:
        ring = _ring(x, weight, left)
        kernel = _spectrum(weight, ring)
        return _signal(torch.bmm(_spectrum(_padded(x, left), ring), _adjoint(kernel)), ring, [0] * len(left), x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, weight, ctx.left = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        ring = _ring(x, weight, ctx.left)
        gradient = _spectrum(gradients[0], ring)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = _signal(torch.bmm(gradient, _spectrum(weight, ring)), ring, ctx.left, x.shape)
        if ctx.needs_input_grad[1]:
            products = torch.bmm(_adjoint(gradient), _spectrum(_padded(x, ctx.left), ring))
            of_weight = _signal(products, ring, [0] * len(ring), weight.shape)
        return of_x, of_weight, None


def _ring(x: Tensor, weight: Tensor, left: List[int]) -> List[int]:
    """Sizes of the transforms."""
    return [_fast_length(max(size + pad, k)) for size, pad, k in zip(x.shape[2:], left, weight.shape[2:])]


def _padded(x: Tensor, left: List[int]) -> Tensor:
    return F.pad(x, [amount for pad in reversed(left) for amount in (pad, 0)])


def _spectrum(signal: Tensor, ring: List[int]) -> Tensor:
    """``(N, C, ...)`` to ``(frequencies, N, C)``, matrices that a batched product takes as they are."""
    spectrum = torch.fft.rfftn(signal, ring, dim=tuple(range(2, signal.ndim)))
    return spectrum.flatten(2).permute(2, 0, 1).contiguous()


def _signal(spectrum: Tensor, ring: List[int], first: List[int], shape: Any) -> Tensor:
    """``(frequencies, N, C)`` back to a signal of this shape, from the ring's elements ``first`` on."""
    half = ring[:-1] + [ring[-1] // 2 + 1]
    signal = spectrum.permute(1, 2, 0).unflatten(-1, half)
    signal = torch.fft.irfftn(signal, ring, dim=tuple(range(2, signal.ndim)))
    for axis, (start, size) in enumerate(zip(first, shape[2:])):
        signal = signal.narrow(2 + axis, start, size)
    return signal.contiguous()  # of which a view would keep the rest of the ring


def _adjoint(batch: Tensor) -> Tensor:
    return batch.mH.resolve_conj().contiguous()


def _fast_length(length: int) -> int:
    """The next whole number that is a product of 2, 3 and 5, and even."""
    length += length % 2
    while True:
        rest = length
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest = rest // factor
        if rest == 1:
            return length
        length += 2


class CausalConv1d(nn.Conv1d, CountedConv):
    """``nn.Conv1d`` that sees the past only, but for what the FFT rounds: :func:`causal_conv1d`, stride 1.

    Args:
        in_channels, out_channels, kernel_size, bias, device, dtype: As in ``nn.Conv1d``.
        stride, padding, dilation, groups, padding_mode: Arguments of ``nn.Conv1d``, of which the default is all there
            is. The zeros before the beginning are no ``padding``, as the output has the input's length.
        method: As in :func:`causal_conv1d`.

    Raises:
        ValueError: Unknown ``method``, or another value than the default of an argument that has one value only.
    """

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: Union[int, Tuple[int]],
            stride: Union[int, Tuple[int]] = 1,
            padding: Union[str, int, Tuple[int]] = 0,
            dilation: Union[int, Tuple[int]] = 1,
            groups: int = 1,
            bias: bool = True,
            padding_mode: str = 'zeros',
            device: Any = None,
            dtype: Any = None,
            method: str = 'auto',
    ) -> None:
        check_method(method)
        _check_fixed(self, _FIXED, dict(
            stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode=padding_mode))
        super().__init__(in_channels, out_channels, kernel_size, bias=bias, device=device, dtype=dtype)
        self.method = method

    def forward(self, input: Tensor) -> Tensor:
        return causal_conv1d(input, self.weight, self.bias, self.method)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, method={self.method!r}'


class FFTConv2d(nn.Conv2d, CountedConv):
    """``nn.Conv2d`` with ``padding='same'``: :func:`fft_conv2d` as a module, stride 1.

    Args:
        in_channels, out_channels, kernel_size, bias, device, dtype: As in ``nn.Conv2d``; kernel sides are odd.
        stride, padding, dilation, groups, padding_mode: Arguments of ``nn.Conv2d``, of which the default is all there
            is.
        method: As in :func:`fft_conv2d`.

    Raises:
        ValueError: Unknown ``method``, or another value than the default of an argument that has one value only.
    """

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: Union[int, Tuple[int, int]],
            stride: Union[int, Tuple[int, int]] = 1,
            padding: Union[str, int, Tuple[int, int]] = 'same',
            dilation: Union[int, Tuple[int, int]] = 1,
            groups: int = 1,
            bias: bool = True,
            padding_mode: str = 'zeros',
            device: Any = None,
            dtype: Any = None,
            method: str = 'auto',
    ) -> None:
        check_method(method)
        _check_fixed(self, {**_FIXED, 'padding': 'same'}, dict(
            stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode=padding_mode))
        super().__init__(
            in_channels, out_channels, kernel_size, padding='same', bias=bias, device=device, dtype=dtype)
        self.method = method

    def forward(self, input: Tensor) -> Tensor:
        return fft_conv2d(input, self.weight, self.bias, self.method)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, method={self.method!r}'


_FIXED = {'stride': 1, 'padding': 0, 'dilation': 1, 'groups': 1, 'padding_mode': 'zeros'}


def _check_fixed(layer: nn.Module, expected: Dict[str, Any], given: Dict[str, Any]) -> None:
    """Raises ValueError unless each argument has its only value, or a tuple of it."""
    for name, value in given.items():
        if any(number != expected[name] for number in (value if isinstance(value, (tuple, list)) else [value])):
            raise ValueError(f'{name} of {type(layer).__name__} must be {expected[name]!r}, got {value!r}')
