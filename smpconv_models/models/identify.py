"""Which of this package's models a state dict is of."""
from functools import lru_cache
from typing import Dict, NamedTuple, Optional

import timm
from torch import Tensor, nn

from smpconv_models import checkpoint


class ArchitectureMatch(NamedTuple):
    """A registered model with the arguments that the weights tell."""
    name: str
    num_classes: int
    in_chans: int

    def __str__(self) -> str:
        return f'{self.name} with {self.num_classes} classes and {self.in_chans} input channels'


def architecture_hint(state_dict: Dict[str, Tensor]) -> str:
    """Return which registered model a state dict fits, to be added to an error's line; '' if it fits none."""
    found = identify(state_dict)
    return f'; it is of {found}' if found else ''


def identify(state_dict: Dict[str, Tensor]) -> Optional[ArchitectureMatch]:
    """The registered model that a state dict fits exactly, by names and shapes; None where there is none.

    Args:
        state_dict: Of the original release's or ours, without wrappers' prefixes.
    """
    if checkpoint.is_original(state_dict):
        state_dict = checkpoint.convert_original(state_dict)
    head = state_dict.get('head.fc.weight')
    stem = state_dict.get('stem.0.conv.weight', state_dict.get('stem.large.conv.weight'))
    if head is None or stem is None or head.ndim != 2 or stem.ndim < 3:
        return None
    for name in timm.list_models('smpconv*'):
        identity = ArchitectureMatch(name, len(head), stem.shape[1])
        if checkpoint.describe_mismatch(state_dict, _without_memory(identity)) is None:
            return identity
    return None


@lru_cache(maxsize=32)
def _without_memory(identity: ArchitectureMatch) -> nn.Module:
    """The model on the meta device; it takes up to half a second to make."""
    return timm.create_model(
        identity.name, num_classes=identity.num_classes, in_chans=identity.in_chans, device='meta')
