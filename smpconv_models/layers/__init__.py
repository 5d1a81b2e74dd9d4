"""From points to kernels to blocks."""
from .accelerate import accelerate_depthwise
from .conv_norm import ConvNormAct, DepthwiseConv2d
from .filter_conv import SMPConv1d, SMPConv2d
from .large_kernel import ConvFFN, LargeKernelBlock, LargeKernelConv
from .long_conv import CausalConv1d, SameConv2d, causal_conv1d, same_conv2d
from .parallel import ParallelConv
from .points import clip_radius, interpolate, sample_kernel, sampling_grid, tents
from .residual import ResidualBlock
from .smp_conv import SMPDepthwiseConv2d, SMPLayer, clip_radius_, smp_layers

__all__ = [
    'CausalConv1d',
    'ConvFFN',
    'ConvNormAct',
    'DepthwiseConv2d',
    'LargeKernelBlock',
    'LargeKernelConv',
    'ParallelConv',
    'ResidualBlock',
    'SMPConv1d',
    'SMPConv2d',
    'SMPDepthwiseConv2d',
    'SMPLayer',
    'SameConv2d',
    'accelerate_depthwise',
    'causal_conv1d',
    'clip_radius',
    'clip_radius_',
    'interpolate',
    'same_conv2d',
    'sample_kernel',
    'sampling_grid',
    'smp_layers',
    'tents',
]
