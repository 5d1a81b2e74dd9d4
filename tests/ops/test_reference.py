"""The reference backend compared with scalar loops in float64."""
import pytest
import torch
from grid import lay_out

from smpconv_models.ops import depthwise_conv2d


def loop_oracle(x, weight, bias, grad, dilation):
    """y, dx, dw, db element by element, from the definition of a "same" depthwise convolution."""
    n_size, c_size, h_size, w_size = x.shape
    kh, kw = weight.shape[2:]
    y, dx, dw, db = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
    for n in range(n_size):
        for c in range(c_size):
            for h in range(h_size):
                for w in range(w_size):
                    g = grad[n, c, h, w].item()
                    total = bias[c].item()
                    db[c] += g
                    for i in range(kh):
                        for j in range(kw):
                            row, column = h + (i - kh // 2) * dilation[0], w + (j - kw // 2) * dilation[1]
                            if 0 <= row < h_size and 0 <= column < w_size:
                                total += x[n, c, row, column].item() * weight[c, 0, i, j].item()
                                dx[n, c, row, column] += g * weight[c, 0, i, j].item()
                                dw[c, 0, i, j] += g * x[n, c, row, column].item()
                    y[n, c, h, w] = total
    return y, dx, dw, db


CASES = {  # (n, c, h, w), (kh, kw), dilation, layout
    'tall_map': ((2, 3, 5, 3), (3, 3), (1, 1), 'nchw'),
    'wide_map': ((2, 2, 3, 6), (5, 5), (1, 1), 'channels_last'),
    'kernel_above_map': ((1, 2, 3, 4), (7, 9), (1, 1), 'nchw'),
    'one_channel': ((2, 1, 4, 5), (3, 5), (1, 1), 'slice'),
    'rectangular_dilated': ((2, 2, 6, 5), (5, 3), (1, 2), 'slice'),
    'dilated': ((1, 2, 7, 6), (3, 3), (3, 2), 'channels_last'),
    'one_element': ((2, 2, 3, 2), (1, 1), (2, 2), 'nchw'),
    'empty_batch': ((0, 2, 3, 4), (3, 3), (1, 1), 'nchw'),
}


@pytest.mark.parametrize('case', CASES)
def test_reference_equals_scalar_loops(case):
    size, kernel_size, dilation, layout = CASES[case]
    x = lay_out(torch.randn(size, dtype=torch.float64), layout).requires_grad_()
    weight = torch.randn(size[1], 1, *kernel_size, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(size[1], dtype=torch.float64, requires_grad=True)
    grad = lay_out(torch.randn(size, dtype=torch.float64), layout)

    y = depthwise_conv2d(x, weight, bias, dilation=dilation, backend='reference')
    results = (y, *torch.autograd.grad(y, (x, weight, bias), grad))

    # at most 64 terms of size about 1 in any sum: far less than 1e-13 from rounding
    for name, got, expected in zip(('y', 'dx', 'dw', 'db'), results, loop_oracle(x, weight, bias, grad, dilation)):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-13, msg=lambda text, name=name: f'{name}: {text}')


def test_poison_reaches_new_tensors():
    """The NaN checks of these tests depend on it."""
    x = torch.zeros(3)
    for tensor in (torch.empty(3), torch.empty_like(x), x.new_empty(3), torch.empty(3, dtype=torch.bfloat16)):
        assert tensor.isnan().all()
