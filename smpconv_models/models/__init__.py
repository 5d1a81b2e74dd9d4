"""timm model families; importing them registers their models."""
from ._builder import ArchitectureMatch, architecture_hint, identify
from ._config_validation import check_arguments, check_network
from .sequence import SMPSequenceNet, create_sequence_model, list_sequence_models
from .smpconv import SMPConvNet
from .smpconv_cifar import SMPResNet

__all__ = [
    'ArchitectureMatch', 'SMPConvNet', 'SMPResNet', 'SMPSequenceNet', 'architecture_hint', 'check_arguments',
    'check_network', 'create_sequence_model', 'identify', 'list_sequence_models',
]
