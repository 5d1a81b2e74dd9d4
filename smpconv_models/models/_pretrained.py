"""Resolution of a model's pretrained weights to a local file that may be loaded."""
import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple

import torch
from timm.models import PretrainedCfg, get_pretrained_cfg
from timm.models._builder import resolve_pretrained_cfg
from torch import Tensor

from smpconv_models import checkpoint
from smpconv_models.checkpoint import original
from smpconv_models.utils import hub_download
from smpconv_models.utils.download import file_sha256

_logger = logging.getLogger(__name__)

# Owner of the repositories on the Hugging Face Hub.
HUB_NAMESPACE = os.environ.get('SMPCONV_HUB_NAMESPACE', 'smpconv')

# In a folder, the first that exists; in a repository only the first, unless its config names another.
_FILES = ('model.safetensors', 'pytorch_model.bin')

Check = Callable[[], Any]


class ResolvedWeights(NamedTuple):
    """Pretrained weights, for timm."""
    overlay: Dict[str, Any]  # changes of the config, by which timm takes the weights from this file
    # weights, whose data is read on use; empty for weights that timm finds without a file
    state_dict: Dict[str, Tensor]
    path: Optional[Path]
    verify: Check  # waits for the file's checksum, and raises ValueError if it is wrong

    @contextmanager
    def error_context(self) -> Iterator[None]:
        """Add the file's name to a ValueError, or raise the error of a wrong checksum instead."""
        try:
            yield
        except ValueError as error:
            self.verify()
            raise ValueError(f'{self.path or "the weights"}: {error}') from error

    def verifying(self, filter_fn: Callable[..., Dict[str, Tensor]]) -> Callable[..., Dict[str, Tensor]]:
        """Return timm's ``pretrained_filter_fn``: the given function, after the check of the file's checksum."""
        def filtered(state_dict: Dict[str, Tensor], model: Any) -> Dict[str, Tensor]:
            self.verify()
            with self.error_context():
                return filter_fn(self.state_dict or state_dict, model)  # timm's has entries that are no tensors
        return filtered


NO_WEIGHTS = ResolvedWeights({}, {}, None, lambda: None)


def resolve_weights(
        variant: str, pretrained_cfg: Any = None, pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        cache_dir: Any = None, **kwargs: Any) -> ResolvedWeights:
    """Find the file of a model's weights, download it if necessary, and validate it. Arguments are timm's.

    A thread computes the checksum while the caller creates the model. ``cache_dir`` is by default the Hub client's
    cache, and PyTorch's for the original files.

    Raises:
        ValueError: The file does not exist, cannot be downloaded, or may not be loaded.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    path, verify = _find(variant, cfg, cache_dir)
    if path is None:  # weights in memory, or none, which timm reports
        return ResolvedWeights(overlay, {}, None, verify)
    try:  # timm's errors about a bad file are long and of many types
        loaded = checkpoint.load_file(path, lazy=True)
        weights, _ = checkpoint.select_state_dict(loaded)
        _check_timms_entry(loaded, path)
    except ValueError:
        verify()  # a wrong checksum explains more
        raise
    # the config's own `state_dict` would take precedence over the file
    overlay.update(source=None, state_dict=None, file=str(path), custom_load=False)
    return ResolvedWeights(overlay, weights, path, verify)


def _check_timms_entry(loaded: Any, path: Path) -> None:
    """Raise ValueError unless the entry that timm takes from a checkpoint is a dictionary; timm does not check it."""
    present = [key for key in ('state_dict_ema', 'model_ema') if loaded.get(key) is not None]
    present += [key for key in ('state_dict', 'model') if key in loaded]
    if present and not isinstance(loaded[present[0]], dict):
        raise ValueError(
            f'{path}: {present[0]} must be a dictionary of tensors, got {checkpoint.shown(loaded[present[0]])}')


def _in_background(check: Callable[[], Any]) -> Check:
    """Start a check in a thread, and return a function that waits for its result."""
    executor = ThreadPoolExecutor(1)
    future = executor.submit(check)
    executor.shutdown(wait=False)
    return future.result


def _find(variant: str, cfg: PretrainedCfg, cache_dir: Any) -> Tuple[Optional[Path], Check]:
    """Return the file and the check of its checksum, which does nothing for a file without one."""
    if cfg.source == 'local-dir':
        folder = Path(str(cfg.file))
        found = [folder / name for name in _FILES if (folder / name).is_file()]
        if not found:
            raise ValueError(f'{folder} has no {" or ".join(_FILES)}')
        return found[0], _in_background(partial(_check_in_folder, found[0]))
    if cfg.source != 'hf-hub' and (cfg.state_dict or cfg.file):
        return (None if cfg.state_dict else Path(str(cfg.file))), NO_WEIGHTS.verify
    if not cfg.hf_hub_id:
        if cfg.url:  # timm would unpickle the download unchecked
            raise ValueError(f'weights are not taken from a URL: download {cfg.url} and give it as `file`')
        return None, NO_WEIGHTS.verify
    original_path = Path(cache_dir or Path(torch.hub.get_dir(), 'checkpoints'), f'{variant}.pth.tar')
    try:
        path = hub_download.hf_download(cfg.hf_hub_id, cfg.hf_hub_filename or _FILES[0], cache_dir)
        digest = _in_background(partial(hub_download.cached_file_digest, path))
        # it removes a damaged file, which therefore happens after reading
        return path, lambda: hub_download.verify_cached_file(path, digest())
    except ValueError as error:
        published = get_pretrained_cfg(variant)
        is_originals_repo = published is not None and cfg.hf_hub_id == published.hf_hub_id and cfg.source != 'hf-hub'
        is_obtainable = isinstance(error, hub_download.RepoNotFoundError) or original_path.exists()
        if not is_originals_repo:
            raise
        if not is_obtainable or variant not in original.GDRIVE_IDS:
            raise ValueError(
                f'{error}; to use a local file, pass pretrained_cfg_overlay=dict(file=...), or --initial-checkpoint to '
                'train.py') from error
        _logger.warning('%s; taking the original file', error)
    return original.download_original(variant, original_path), NO_WEIGHTS.verify


def _check_in_folder(path: Path) -> None:
    with open(path.parent / 'config.json', encoding='utf-8') as file:  # timm has read it
        config: Dict[str, Any] = json.load(file)
    # transformers copies unknown entries of a config beside weights that it writes again
    expected = None if 'transformers_version' in config else config.get('sha256')
    if expected is not None and file_sha256(path) != expected:
        raise ValueError(f'{path} is damaged: its checksum is not the one in config.json, {checkpoint.shown(expected)}')
