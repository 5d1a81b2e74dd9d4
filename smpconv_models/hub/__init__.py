"""Weights as folders for the Hugging Face Hub: safetensors, ``config.json``, a card.

timm loads them: ``timm.create_model('local-dir:FOLDER', pretrained=True)``, or ``'hf-hub:OWNER/NAME'`` once published.
"""
from ._convert import Converted, convert
from ._repository import Publication, load, publish

__all__ = ['Converted', 'Publication', 'convert', 'load', 'publish']
