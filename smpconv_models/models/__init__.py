"""timm model families; importing them registers their models."""
from .identify import Identity, identify
from .smpconv import SMPConvNet

__all__ = ['Identity', 'SMPConvNet', 'identify']
