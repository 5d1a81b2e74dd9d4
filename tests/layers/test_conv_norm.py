"""Folding and merging compared with the computation that they replace, in float64."""
import pytest
import torch
import torch.nn.functional as F
from common import randomize_
from torch import nn

from smpconv_models.layers.conv_norm import batch_norm_affine, fuse_bn_conv, fuse_conv_bn
from smpconv_models.layers.reparam import merge_kernels


def double(*size):
    return torch.randn(*size, dtype=torch.float64)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('affine', [True, False])
def test_norm_affine(affine):
    norm = nn.BatchNorm2d(3, affine=affine, eps=0.1, dtype=torch.float64).eval()
    with torch.no_grad():
        norm.running_mean.copy_(double(3))
        norm.running_var.uniform_(0.1, 3)
        if affine:
            norm.weight.copy_(double(3))
            norm.bias.copy_(double(3))
    scale, shift = batch_norm_affine(norm)
    x = double(2, 3, 4, 5)
    close(scale.view(-1, 1, 1) * x + shift.view(-1, 1, 1), norm(x))


def test_norm_affine_of_half_precision_is_float32():
    norm = randomize_(nn.BatchNorm2d(3)).bfloat16()
    scale, shift = batch_norm_affine(norm)
    assert scale.dtype == shift.dtype == torch.float32


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('groups', [1, 2, 4])
def test_fold_after(groups, bias):
    weight, bias = double(4, 4 // groups, 3, 5), double(4) if bias else None
    scale, shift, x = double(4), double(4), double(2, 4, 6, 7)
    expected = F.conv2d(x, weight, bias, padding='same', groups=groups)
    expected = scale.view(-1, 1, 1) * expected + shift.view(-1, 1, 1)
    folded, folded_bias = fuse_conv_bn(weight, bias, scale, shift)
    close(F.conv2d(x, folded, folded_bias, padding='same', groups=groups), expected)


@pytest.mark.parametrize('bias', [True, False])
def test_fold_before(bias):
    weight, bias = double(5, 4, 1, 1), double(5) if bias else None
    scale, shift, x = double(4), double(4), double(2, 4, 6, 7)
    expected = F.conv2d(scale.view(-1, 1, 1) * x + shift.view(-1, 1, 1), weight, bias)
    close(F.conv2d(x, *fuse_bn_conv(weight, bias, scale, shift)), expected)


@pytest.mark.parametrize('small', [(1, 1), (3, 5), (7, 9), (7, 1)])
def test_merge_parallel(small):
    large_kernel, small_kernel, x = double(3, 1, 7, 9), double(3, 1, *small), double(2, 3, 8, 6)
    expected = sum(F.conv2d(x, kernel, padding='same', groups=3) for kernel in (large_kernel, small_kernel))
    close(F.conv2d(x, merge_kernels(large_kernel, small_kernel), padding='same', groups=3), expected)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize('fold', [fuse_conv_bn, fuse_bn_conv])
def test_folding_keeps_the_dtype_of_the_weight(fold, dtype):
    weight, bias = fold(torch.ones(4, 4, 1, 1, dtype=dtype), torch.ones(4, dtype=dtype), torch.ones(4), torch.ones(4))
    assert weight.dtype == bias.dtype == dtype
