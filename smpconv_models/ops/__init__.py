"""One operation, several backends: large-kernel depthwise convolution."""
from .depthwise import available_backends, check_options, depthwise_conv2d

__all__ = ['available_backends', 'check_options', 'depthwise_conv2d']
