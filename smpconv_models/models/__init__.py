"""timm model families; importing them registers their models."""
from .identify import Identity, identify, whose
from .smpconv import SMPConvNet, check_arguments

__all__ = ['Identity', 'SMPConvNet', 'check_arguments', 'identify', 'whose']
