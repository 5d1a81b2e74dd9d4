"""Where timm finds the pretrained weights of a model: on this machine, in a file that may be read."""
import json
import logging
import os
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import torch
from timm.models import PretrainedCfg, get_pretrained_cfg
from timm.models._builder import resolve_pretrained_cfg
from torch import Tensor

from smpconv_models import checkpoint, download, original

_logger = logging.getLogger(__name__)

# Owner of the repositories on the Hugging Face Hub.
HUB_NAMESPACE = os.environ.get('SMPCONV_HUB_NAMESPACE', 'smpconv')

# In a folder or repository, the one that comes first.
_FILES = ('model.safetensors', 'pytorch_model.bin')


def local_weights(
        variant: str,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        cache_dir: Any = None,
        **kwargs: Any,
) -> Tuple[Dict[str, Any], Dict[str, Tensor]]:
    """The overlay with which timm takes weights from a file that is here and was looked at, and what is in it.

    Args:
        variant: The model's name.
        pretrained_cfg: As timm's ``create_model`` passes it on.
        pretrained_cfg_overlay: Likewise.
        cache_dir: Where downloads are kept, by default the Hub client's cache, and PyTorch's for the original files.

    Returns:
        The overlay; the weights, which are read where they are used, none of those that timm finds itself.

    Raises:
        ValueError: The file isn't there, can't be downloaded, or may not be read.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    path = _find(variant, cfg, cache_dir)
    if path is None:  # weights in memory, or none, which timm tells
        return overlay, {}
    # before timm reads it, whose complaints of a bad file are long and of many kinds
    weights, _ = checkpoint.select_state_dict(checkpoint.read_file(path, lazy=True))
    # a configuration's own `state_dict` would come before the file
    return {**overlay, 'source': None, 'state_dict': None, 'file': str(path), 'custom_load': False}, weights


def _find(variant: str, cfg: PretrainedCfg, cache_dir: Any) -> Optional[Path]:
    if cfg.source == 'local-dir':
        return _in_folder(Path(str(cfg.file)))
    if cfg.source != 'hf-hub' and (cfg.state_dict or cfg.file):
        return None if cfg.state_dict else Path(str(cfg.file))
    if not cfg.hf_hub_id:
        return None
    original_path = Path(cache_dir or Path(torch.hub.get_dir(), 'checkpoints'), f'{variant}.pth.tar')
    try:
        return download.from_hub(cfg.hf_hub_id, cfg.hf_hub_filename or _FILES[0], cache_dir)
    except ValueError as error:
        is_there = isinstance(error, download.NotPublished) or original_path.exists()
        if not (is_there and _is_of_original(variant, cfg)):
            raise
        _logger.warning('%s; taking the original file', error)
    return original.download(variant, original_path)


def _is_of_original(variant: str, cfg: PretrainedCfg) -> bool:
    """Whether the repository is the one for the original's weights, and nobody has asked for another by its name."""
    published = get_pretrained_cfg(variant)
    return (variant in original.FILES and cfg.source != 'hf-hub'
            and published is not None and cfg.hf_hub_id == published.hf_hub_id)


def _in_folder(folder: Path) -> Path:
    """The weights in a folder that timm's or this package's programs have written."""
    found = [folder / name for name in _FILES if (folder / name).is_file()]
    if not found:
        raise ValueError(f'{folder} has no {" or ".join(_FILES)}')
    expected = _read_config(folder).get('sha256')
    if expected is not None and checkpoint.file_sha256(found[0]) != expected:
        raise ValueError(f'{found[0]} is damaged: its checksum is not the one in config.json, {expected}')
    return found[0]


def _read_config(folder: Path) -> Dict[str, Any]:
    with open(folder / 'config.json', encoding='utf-8') as file:  # timm has read it
        return json.load(file)
