"""One operation, several backends: large-kernel depthwise convolution."""
from ._counting import is_counted
from .depthwise import available_backends, check_options, depthwise_conv2d

__all__ = ['available_backends', 'check_options', 'depthwise_conv2d', 'is_counted']
