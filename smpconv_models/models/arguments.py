"""What a network's constructor takes, by the model's name."""
from typing import Any, get_type_hints

from timm.models import model_entrypoint

from ._configuration import check_names


def check_arguments(name: str, arguments: Any) -> None:
    """Raises ValueError unless these are arguments of the model's network, by name: those of a checkpoint, say.

    Args:
        name: Of one of this package's models for images.
        arguments: To its constructor.
    """
    check_names(get_type_hints(model_entrypoint(name))['return'], arguments)
