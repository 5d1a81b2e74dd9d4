"""Large-kernel convolutional networks of self-moving points (SMPConv, CVPR 2023) for timm.

Importing the package registers its models with timm, and does nothing else.
"""
from .layers import DepthwiseConv2d, SMPDepthwiseConv2d, accelerate_depthwise, clip_radius_
from .models import SMPConvNet
from .ops import available_backends, depthwise_conv2d

__version__ = '0.1.0'

__all__ = [
    'DepthwiseConv2d',
    'SMPConvNet',
    'SMPDepthwiseConv2d',
    '__version__',
    'accelerate_depthwise',
    'available_backends',
    'clip_radius_',
    'depthwise_conv2d',
]
