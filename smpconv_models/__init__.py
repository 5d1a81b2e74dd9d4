"""Large-kernel convolutional networks of self-moving points (SMPConv, CVPR 2023) for timm.

Importing the package registers its models with timm, and does nothing else.
"""
from typing import TYPE_CHECKING, Any

from .layers import (
    DepthwiseConv1d,
    DepthwiseConv2d,
    SMPConv1d,
    SMPConv2d,
    SMPDepthwiseConv2d,
    accelerate_depthwise,
    clip_radius_,
)
from .models import SMPConvNet, SMPResNet, SMPSequenceNet, create_sequence_model, list_sequence_models
from .ops import available_backends, depthwise_conv1d, depthwise_conv2d

if TYPE_CHECKING:
    from .prediction import predict

__version__ = '0.1.0'

__all__ = [
    'DepthwiseConv1d', 'DepthwiseConv2d', 'SMPConv1d', 'SMPConv2d', 'SMPConvNet', 'SMPDepthwiseConv2d', 'SMPResNet',
    'SMPSequenceNet', '__version__', 'accelerate_depthwise', 'available_backends', 'clip_radius_',
    'create_sequence_model', 'depthwise_conv1d', 'depthwise_conv2d', 'list_sequence_models', 'predict',
]


def __getattr__(name: str) -> Any:
    if name == 'predict':  # imported on first use, as the models do not need the parts of training
        from .prediction import predict
        return predict
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
