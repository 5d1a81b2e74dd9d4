"""One operation, several backends: large-kernel depthwise convolution."""
from ._custom_op import has_autocast, is_counted, is_exporting
from .depthwise import available_backends, depthwise_conv1d, depthwise_conv2d, validate_options

__all__ = [
    'available_backends', 'depthwise_conv1d', 'depthwise_conv2d', 'has_autocast', 'is_counted', 'is_exporting',
    'validate_options',
]
