"""Weights as folders of the Hugging Face Hub: safetensors, ``config.json``, a card.

timm reads them: ``timm.create_model('local-dir:FOLDER', pretrained=True)``, or ``'hf-hub:OWNER/NAME'`` when published.
"""
from .conversion import Converted, convert
from .loading import load
from .publication import Publication, publish

__all__ = ['Converted', 'Publication', 'convert', 'load', 'publish']
