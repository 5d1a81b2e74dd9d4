"""What a network's constructor takes, by the model's name."""
from typing import Any

from ._configuration import check_names
from .smpconv import SMPConvNet
from .smpconv_cifar import SMPResNet


def check_arguments(name: str, arguments: Any) -> None:
    """Raises ValueError unless these are arguments of the model's network, by name: those of a checkpoint, say.

    Args:
        name: Of one of this package's models for images.
        arguments: To its constructor.
    """
    network: Any = SMPResNet if name == 'smpconv_cifar' else SMPConvNet
    check_names(network, arguments)
