"""Weights as folders of the Hugging Face Hub: safetensors, ``config.json``, a card.

timm reads them: ``timm.create_model('local-dir:FOLDER', pretrained=True)``, or ``'hf-hub:OWNER/NAME'`` when published.
"""
from ._convert import Converted, convert
from ._load import load
from ._publish import Publication, publish

__all__ = ['Converted', 'Publication', 'convert', 'load', 'publish']
