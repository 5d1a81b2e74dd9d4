"""One operation, several backends: large-kernel depthwise convolution."""
from ._context import has_autocast, is_counted, is_exporting
from .depthwise import available_backends, check_options, depthwise_conv2d

__all__ = ['available_backends', 'check_options', 'depthwise_conv2d', 'has_autocast', 'is_counted', 'is_exporting']
