"""From points to kernels to blocks."""
from .accelerate import accelerate_depthwise
from .blocks import ConvFFN, LargeKernelBlock, ResidualBlock
from .conv_norm import ConvNormActBlock, DepthwiseConv1d, DepthwiseConv2d
from .fft_conv import CausalConv1d, FFTConv2d, causal_conv1d, fft_conv2d
from .points import clip_radius, evaluate_points, sample_kernel, sampling_grid, tent_basis
from .reparam import ReparamConv, ReparamLargeKernelConv
from .smp_conv import SMPConv1d, SMPConv2d
from .smp_depthwise import SMPDepthwiseConv2d, SMPLayer, clip_radius_, smp_layers

__all__ = [
    'CausalConv1d', 'ConvFFN', 'ConvNormActBlock', 'DepthwiseConv1d', 'DepthwiseConv2d', 'FFTConv2d',
    'LargeKernelBlock', 'ReparamConv', 'ReparamLargeKernelConv', 'ResidualBlock', 'SMPConv1d', 'SMPConv2d',
    'SMPDepthwiseConv2d', 'SMPLayer', 'accelerate_depthwise', 'causal_conv1d', 'clip_radius', 'clip_radius_',
    'evaluate_points', 'fft_conv2d', 'sample_kernel', 'sampling_grid', 'smp_layers', 'tent_basis',
]
