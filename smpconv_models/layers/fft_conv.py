"""Convolutions with kernels as long as their input, by the direct sum or by fast Fourier transforms (FFT)."""
import math
from typing import Any, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_variadic

from smpconv_models.ops import has_autocast, is_counted, is_exporting

from .conv_norm import CountedConv, at_least_float32

METHODS = ('auto', 'direct', 'fft')

# Cost of the FFT on a CPU, forward and backward pass together, in products of the direct sum: for each element of a
# signal's transform, of a kernel's, and for each product of the two. Fitted to 67 convolutions with 2 threads (AVX2):
# 63 choices are right, and none of the others is more than 1.5 times as slow. benchmarks/long_conv.py repeats them.
_COST_PER_SIGNAL, _COST_PER_KERNEL, _COST_PER_PRODUCT = 120, 250, 3

# Smallest kernel for the FFT on other devices, where nothing was measured. The original release takes the FFT for
# sequences of 784 and more, not for 182 and less, and never for images.
_MIN_FFT_KERNEL = 256


def causal_conv1d(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None, method: str = 'auto') -> Tensor:
    """Compute ``y[n, o, t] = bias[o] + sum over c, s of weight[o, c, k - 1 - s] * x[n, c, t - s]``, 0 before the start.

    Equal to ``F.conv1d(F.pad(x, (k - 1, 0)), weight, bias)``; equation 3 of the paper, cut off at the present. A leaf
    function for fx.

    Args:
        x: ``(N, C, L)``.
        weight: ``(O, C, k)``, the last element for the present; k may exceed L.
        bias: ``(O,)``.
        method: 'direct', 'fft', or 'auto': the one that is expected to be faster, by measurements on a CPU; on other
            devices the FFT for kernels of 256 elements and more. 'auto' is 'direct' if scripted, traced or exported,
            and while a FLOP counter runs.

    Returns:
        ``(N, O, L)`` in the dtype of a convolution. The FFT is computed in float32 at least; its rounding errors are
        relative to the largest values of the sequence, not to each output's own. They affect earlier steps too, and a
        NaN or infinity at any step spreads to all steps. The FFT has no forward-mode derivatives; 'direct' has.

    Raises:
        ValueError: The ``method`` is unknown, the shapes do not fit, or 'fft' is scripted, traced or given numbers that
            are not real.
    """
    if has_torch_function_variadic(x, weight):
        return handle_torch_function(causal_conv1d, (x, weight), x, weight, bias, method)
    pad_left = [weight.shape[2] - 1]
    if _use_fft(method, x, weight, bias, pad_left):
        return _fft_conv(x, weight, bias, pad_left)
    return F.conv1d(F.pad(x, [pad_left[0], 0]), weight, bias)


def fft_conv2d(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None, method: str = 'auto') -> Tensor:
    """Compute ``F.conv2d(x, weight, bias, padding=(kh // 2, kw // 2))`` for odd kernels. A leaf function for fx.

    Args:
        x: ``(N, C, H, W)``.
        weight: ``(O, C, kh, kw)``, both odd.
        bias: ``(O,)``.
        method: Name of an algorithm, see :func:`causal_conv1d`.

    Returns:
        ``(N, O, H, W)``; numerics as in :func:`causal_conv1d`.

    Raises:
        ValueError: The kernel is even, or as for :func:`causal_conv1d`.
    """
    if has_torch_function_variadic(x, weight):
        return handle_torch_function(fft_conv2d, (x, weight), x, weight, bias, method)
    if weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
        raise ValueError(f'expected a kernel of odd sizes, got {weight.shape[2]}x{weight.shape[3]}')
    pad_left = [weight.shape[2] // 2, weight.shape[3] // 2]
    if _use_fft(method, x, weight, bias, pad_left):
        return _fft_conv(x, weight, bias, pad_left)
    return F.conv2d(x, weight, bias, padding=(pad_left[0], pad_left[1]))


def check_method(method: str) -> None:
    """Raise ValueError unless the method exists."""
    if method not in METHODS:
        raise ValueError(f'method must be one of {METHODS}, got {method!r}')


def _use_fft(method: str, x: Tensor, weight: Tensor, bias: Optional[Tensor], pad_left: List[int]) -> bool:
    if torch.jit.is_scripting() or torch.jit.is_tracing():
        if method == 'fft':
            raise ValueError("method 'fft' cannot be scripted or traced: use 'auto' or 'direct'")
        return False
    return _is_fft_wanted(method, x, weight, bias, pad_left) and x.shape[0] > 0  # FFTs refuse empty batches


@torch.jit.unused
def _is_fft_wanted(method: str, x: Tensor, weight: Tensor, bias: Optional[Tensor], pad_left: List[int]) -> bool:
    check_method(method)
    are_real = x.is_floating_point() and weight.is_floating_point()
    if method == 'fft' and not are_real:
        raise ValueError(f"method 'fft' takes floating point numbers, got {x.dtype} and {weight.dtype}")
    if x.ndim != weight.ndim or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f'expected an input (N, C, ...) for a weight (O, C, ...) of the same C, got {tuple(x.shape)} and '
            f'{tuple(weight.shape)}')
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f'expected a bias {tuple(weight.shape[:1])}, got {tuple(bias.shape)}')
    if method != 'auto':
        return method == 'fft'
    return are_real and not is_exporting() and not is_counted() and _is_fft_faster(x, weight, pad_left)


def _is_fft_faster(x: Tensor, weight: Tensor, pad_left: List[int]) -> bool:
    if x.device.type != 'cpu':
        return x.ndim == 3 and weight.shape[2] >= _MIN_FFT_KERNEL
    n, c, o = x.shape[0], x.shape[1], weight.shape[0]
    direct = n * c * o * math.prod(x.shape[2:]) * math.prod(weight.shape[2:])
    per_element = _COST_PER_SIGNAL * n * (c + o) + _COST_PER_KERNEL * c * o + _COST_PER_PRODUCT * n * c * o
    return direct > per_element * math.prod(_fft_shape(x, weight, pad_left))


@torch.jit.unused
def _fft_conv(x: Tensor, weight: Tensor, bias: Optional[Tensor], pad_left: List[int]) -> Tensor:
    """Convolve by FFT, with zeros before each dimension and, after it, as many as keep the input's size."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    device = x.device.type if has_autocast(x.device.type) else 'cpu'  # meta has none
    if torch.is_autocast_enabled(device):
        dtype = dtype if dtype == torch.float64 else torch.get_autocast_dtype(device)  # as autocast does
    elif x.dtype != weight.dtype:
        raise ValueError(f'expected an input and a weight of one type, got {x.dtype} and {weight.dtype}')
    y: Any = _FFTConv.apply(at_least_float32(x), at_least_float32(weight), pad_left)
    if bias is not None:
        y = y + bias.view(-1, *[1] * len(pad_left))
    return y.to(dtype)


class _FFTConv(torch.autograd.Function):
    """A convolution by FFT, forward and backward, that saves its arguments for the backward pass, and no spectra.

    The circular convolution has room for the input and the zeros before it, and for the kernel: terms that wrap around
    meet the zeros, or are cut off. PyTorch's own derivative saves padded copies and spectra of both operands, four
    times as much memory. It also passes conjugate and transposed views to the matrix products, which then compute the
    frequencies one after the other: 3 to 6 times as slow on a CPU.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, pad_left: List[int]) -> Tensor:
        shape = _fft_shape(x, weight, pad_left)
        products = torch.bmm(_rfft(_padded(x, pad_left), shape), _conj_transpose(_rfft(weight, shape)))
        return _irfft(products, shape, [0] * len(pad_left), x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, weight, ctx.pad_left = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        shape = _fft_shape(x, weight, ctx.pad_left)
        grad = _rfft(grads[0], shape)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _irfft(torch.bmm(grad, _rfft(weight, shape)), shape, ctx.pad_left, x.shape)
        if ctx.needs_input_grad[1]:
            products = torch.bmm(_conj_transpose(grad), _rfft(_padded(x, ctx.pad_left), shape))
            grad_weight = _irfft(products, shape, [0] * len(shape), weight.shape)
        return grad_x, grad_weight, None


def _fft_shape(x: Tensor, weight: Tensor, pad_left: List[int]) -> List[int]:
    return [_fast_length(max(size + pad, k)) for size, pad, k in zip(x.shape[2:], pad_left, weight.shape[2:])]


def _padded(x: Tensor, pad_left: List[int]) -> Tensor:
    return F.pad(x, [amount for pad in reversed(pad_left) for amount in (pad, 0)])


def _rfft(signal: Tensor, shape: List[int]) -> Tensor:
    """Transform ``(N, C, ...)`` to ``(frequencies, N, C)``, matrices that a batched product takes without a copy."""
    spectrum = torch.fft.rfftn(signal, shape, dim=tuple(range(2, signal.ndim)))
    return spectrum.flatten(2).permute(2, 0, 1).contiguous()


def _irfft(spectrum: Tensor, shape: List[int], first: List[int], size: Any) -> Tensor:
    """Transform ``(frequencies, N, C)`` back, and cut the signal of this size out from the element ``first``."""
    half = shape[:-1] + [shape[-1] // 2 + 1]
    signal = spectrum.permute(1, 2, 0).unflatten(-1, half)
    signal = torch.fft.irfftn(signal, shape, dim=tuple(range(2, signal.ndim)))
    for axis, (start, length) in enumerate(zip(first, size[2:])):
        signal = signal.narrow(2 + axis, start, length)
    return signal.contiguous()  # a view would keep the whole signal alive


def _conj_transpose(batch: Tensor) -> Tensor:
    return batch.mH.resolve_conj().contiguous()


def _fast_length(length: int) -> int:
    """Return the next even number that is a product of 2, 3 and 5."""
    length += length % 2
    while True:
        rest = length
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest = rest // factor
        if rest == 1:
            return length
        length += 2


class _SameLengthConv(CountedConv):
    """Constructor that :class:`CausalConv1d` and :class:`FFTConv2d` share, for their bases in PyTorch."""

    _padding: Any

    def __init__(
            self, in_channels: int, out_channels: int, kernel_size: Any, stride: Any = 1, padding: Any = None,
            dilation: Any = 1, groups: int = 1, bias: bool = True, padding_mode: str = 'zeros', device: Any = None,
            dtype: Any = None, method: str = 'auto') -> None:
        check_method(method)
        fixed = {
            'stride': (stride, 1), 'padding': (self._padding if padding is None else padding, self._padding),
            'dilation': (dilation, 1), 'groups': (groups, 1), 'padding_mode': (padding_mode, 'zeros')}
        for name, (given, expected) in fixed.items():
            if any(value != expected for value in (given if isinstance(given, (tuple, list)) else [given])):
                raise ValueError(f'{name} of {type(self).__name__} must be {expected!r}, got {given!r}')
        super().__init__(
            in_channels, out_channels, kernel_size, padding=self._padding, bias=bias, device=device, dtype=dtype)
        self.method = method

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, method={self.method!r}'


class CausalConv1d(_SameLengthConv, nn.Conv1d):
    """``nn.Conv1d`` that sees the past only, up to the FFT's rounding: :func:`causal_conv1d`, stride 1.

    Args:
        in_channels, out_channels, kernel_size, bias, device, dtype: Arguments of ``nn.Conv1d``.
        stride, padding, dilation, groups, padding_mode: Arguments of ``nn.Conv1d``, which must have their defaults. The
            zeros before the beginning are no ``padding``, as the output has the input's length.
        method: Name of an algorithm, see :func:`causal_conv1d`.

    Raises:
        ValueError: Unknown ``method``, or another value than the default of an argument that must have it.
    """

    _padding = 0

    def forward(self, input: Tensor) -> Tensor:
        return causal_conv1d(input, self.weight, self.bias, self.method)


class FFTConv2d(_SameLengthConv, nn.Conv2d):
    """``nn.Conv2d`` with ``padding='same'``: :func:`fft_conv2d` as a module, stride 1.

    Args:
        in_channels, out_channels, kernel_size, bias, device, dtype: Arguments of ``nn.Conv2d``; kernel sides are odd.
        stride, padding, dilation, groups, padding_mode: Arguments of ``nn.Conv2d``, which must have their defaults,
            except for ``padding``: None stands for 'same', the only other value.
        method: Name of an algorithm, see :func:`fft_conv2d`.

    Raises:
        ValueError: Unknown ``method``, or another value than the default of an argument that must have it.
    """

    _padding = 'same'

    def forward(self, input: Tensor) -> Tensor:
        return fft_conv2d(input, self.weight, self.bias, self.method)
