"""timm model families; importing them registers their models."""
from .smpconv import SMPConvNet

__all__ = ['SMPConvNet']
