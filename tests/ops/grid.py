"""The named cases over which backends are compared, and the tolerances."""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Shape:
    n: int
    c: int
    h: int
    w: int
    kh: int
    kw: int
    dilation: tuple = (1, 1)
    stride: tuple = (1, 1)
    padding: object = 'same'

    @property
    def options(self):
        return dict(stride=self.stride, padding=self.padding, dilation=self.dilation)

    @property
    def is_same(self):
        """Return whether an odd kernel is centred on each pixel."""
        return self.options == dict(stride=(1, 1), padding='same', dilation=(1, 1)) and self.kh * self.kw % 2 == 1

    @property
    def outputs(self):
        """Height and width of the output."""
        return plain_conv(torch.empty(1, 1, self.h, self.w, device='meta'), torch.empty(
            1, 1, self.kh, self.kw, device='meta'), None, **self.options).shape[2:]


# Large kernels have 17 channels: with 2 to 16, plain bfloat16 channels_last conv2d, which the errors are measured
# against, does not return on CPUs with AVX512-BF16 (oneDNN 3.13). test_few_channels_return holds the backends there.
SHAPES = {
    'k3': Shape(2, 5, 8, 13, 3, 3),
    'k5_odd_map': Shape(3, 3, 11, 14, 5, 5),
    'k13_map_below_kernel': Shape(2, 4, 6, 9, 13, 13),
    'k15': Shape(2, 4, 17, 12, 15, 15),
    'k31': Shape(1, 17, 12, 19, 31, 31),
    'k51': Shape(1, 17, 14, 9, 51, 51),
    'one_channel': Shape(3, 1, 9, 7, 7, 7),
    'rectangular': Shape(2, 3, 10, 15, 3, 17),
    'one_element_high': Shape(2, 3, 9, 12, 1, 5),
    'dilated': Shape(2, 3, 16, 19, 7, 5, (2, 3)),
    'dilated_large': Shape(2, 3, 13, 18, 15, 15, (2, 2)),
    'one_pixel': Shape(2, 3, 1, 1, 5, 5),
    'even': Shape(2, 3, 9, 12, 4, 6),
    'strided': Shape(2, 3, 11, 14, 7, 7, stride=(2, 2), padding=3),
    'strided_even': Shape(2, 3, 12, 9, 4, 15, stride=(2, 3), padding=(1, 5)),
    'strided_dilated': Shape(2, 3, 17, 13, 7, 3, (2, 1), (3, 2), 4),
    'valid': Shape(2, 3, 19, 17, 15, 7, padding='valid'),
    'wide_padding': Shape(2, 3, 5, 6, 5, 7, padding=(8, 4)),
    'sequence': Shape(2, 5, 1, 40, 1, 31),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ('nchw', 'channels_last', 'slice')


def make(shape, dtype, layout='nchw', device='cpu'):
    """Return input, weight, bias and output gradient; input and gradient in the given layout."""
    def randn(*size):
        return torch.randn(*size, dtype=dtype).to(device)
    return (
        lay_out(randn(shape.n, shape.c, shape.h, shape.w), layout),
        randn(shape.c, 1, shape.kh, shape.kw),
        randn(shape.c),
        lay_out(randn(shape.n, shape.c, *shape.outputs), layout),
    )


def lay_out(tensor, layout):
    """Return the same values, as channels_last or as a slice of a larger tensor of other values."""
    if layout == 'channels_last':
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == 'slice':
        n, c, h, w = tensor.shape
        part = tensor.new_full((n + 1, c + 2, h + 3, w + 4), 1e4)[1:, 1:c + 1, 2:h + 2, 3:w + 3]
        return part.copy_(tensor)
    return tensor


def plain_conv(x, weight, bias, dilation=1, stride=1, padding='same'):
    """Compute the operation by its definition."""
    return F.conv2d(x, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=x.shape[1])


def with_gradients(function, x, weight, bias, grad):
    """Return y, dx, dw, db of ``function(x, weight, bias)``."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    y = function(*leaves)
    return dict(zip(('y', 'dx', 'dw', 'db'), (y.detach(), *torch.autograd.grad(y, leaves, grad))))


def terms(shape):
    """Return how many products at most are summed in one element of each result."""
    kernel, pixels = shape.kh * shape.kw, shape.n * math.prod(shape.outputs)
    return {'y': kernel + 1, 'dx': kernel, 'dw': pixels, 'db': pixels}


def assert_as_exact_as(got, plain, exact, num_terms):
    """Assert that ``got`` errs at most twice as much as ``plain``, of the same dtype, plus a rounding band.

    The band: one rounding of the largest result, and the accumulator's own (float32 for the half precisions). The
    terms are products of standard normals, so a partial sum of n is about sqrt(n), and n of its roundings walk about
    sqrt(n) times as far as one: n * eps.
    """
    dtype = got.dtype
    accumulator = torch.promote_types(dtype, torch.float32)
    got, plain = got.double(), plain.double()
    band = torch.finfo(dtype).eps * exact.abs().max() + torch.finfo(accumulator).eps * num_terms
    allowed = 2 * (plain - exact).abs().max() + band
    error = (got - exact).abs().max()  # NaN fails the comparison too
    assert error <= allowed, f'error {error:.3g} above {allowed:.3g}'
