"""From points to kernels to blocks."""
from .accelerate import accelerate_depthwise
from .conv_norm import ConvNormAct, DepthwiseConv2d
from .large_kernel import ConvFFN, LargeKernelBlock, LargeKernelConv
from .points import clip_radius, interpolate, sample_kernel, sampling_grid, tents
from .smp_conv import SMPDepthwiseConv2d, clip_radius_, smp_layers

__all__ = [
    'ConvFFN',
    'ConvNormAct',
    'DepthwiseConv2d',
    'LargeKernelBlock',
    'LargeKernelConv',
    'SMPDepthwiseConv2d',
    'accelerate_depthwise',
    'clip_radius',
    'clip_radius_',
    'interpolate',
    'sample_kernel',
    'sampling_grid',
    'smp_layers',
    'tents',
]
