"""One operation, several backends: large-kernel depthwise convolution."""
from .depthwise import available_backends, depthwise_conv2d

__all__ = ['available_backends', 'depthwise_conv2d']
