"""Where timm finds the pretrained weights of a model: on this machine, in a file that may be read."""
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

# In a folder, the one that comes first; in a repository only the first, unless its configuration names another.
_FILES = ('model.safetensors', 'pytorch_model.bin')


Check = Callable[[], Any]


class LocalWeights(NamedTuple):
    """What timm needs, and what must be known before it is used.

    Attributes:
        overlay: Of the configuration: timm takes the weights from this file.
        state_dict: The weights, read where they are used; none of those that timm finds itself.
        path: The file.
        verify: Waits until the file has been held against its checksum; raises ValueError if it is another.
    """
    overlay: Dict[str, Any]
    state_dict: Dict[str, Tensor]
    path: Optional[Path]
    verify: Check

    @contextmanager
    def named(self) -> Iterator[None]:
        """Names the file in a ValueError; that it is another than it should be says more."""
        try:
            yield
        except ValueError as error:
            self.verify()
            raise ValueError(f'{self.path or "the weights"}: {error}') from error


    def checked(self, filter_fn: Callable[..., Dict[str, Tensor]]) -> Callable[..., Dict[str, Tensor]]:
        """timm's ``pretrained_filter_fn``: the given one, of a file that is held against its checksum first."""
        def filtered(state_dict: Dict[str, Tensor], model: Any) -> Dict[str, Tensor]:
            self.verify()
            with self.named():
                return filter_fn(self.state_dict or state_dict, model)  # timm keeps what is no tensor
        return filtered


NO_WEIGHTS = LocalWeights({}, {}, None, lambda: None)


def local_weights(
        variant: str,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        cache_dir: Any = None,
        **kwargs: Any,
) -> LocalWeights:
    """The file that a model's weights are in, downloaded if need be, and looked at.

    Its checksum is computed while the caller goes on, creating the model, say.

    Args:
        variant: The model's name.
        pretrained_cfg: As timm's ``create_model`` passes it on.
        pretrained_cfg_overlay: Likewise.
        cache_dir: Where downloads are kept, by default the Hub client's cache, and PyTorch's for the original files.

    Raises:
        ValueError: The file isn't there, can't be downloaded, or may not be read.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    path, verify = _find(variant, cfg, cache_dir)
    if path is None:  # weights in memory, or none, which timm tells
        return LocalWeights(overlay, {}, None, verify)
    try:  # before timm reads it, whose complaints of a bad file are long and of many kinds
        weights, _ = checkpoint.select_state_dict(checkpoint.read_file(path, lazy=True))
    except ValueError:
        verify()  # another checksum says more
        raise
    # a configuration's own `state_dict` would come before the file
    overlay.update(source=None, state_dict=None, file=str(path), custom_load=False)
    return LocalWeights(overlay, weights, path, verify)


def _in_background(check: Callable[[], Any]) -> Check:
    """Begins, in a thread; the result is waited for by a call."""
    executor = ThreadPoolExecutor(1)
    future = executor.submit(check)
    executor.shutdown(wait=False)
    return future.result


def _nothing() -> None:
    """Of a file without a checksum beside it."""


def _find(variant: str, cfg: PretrainedCfg, cache_dir: Any) -> Tuple[Optional[Path], Check]:
    """The file, and its check."""
    if cfg.source == 'local-dir':
        return _in_folder(Path(str(cfg.file)))
    if cfg.source != 'hf-hub' and (cfg.state_dict or cfg.file):
        return (None if cfg.state_dict else Path(str(cfg.file))), _nothing
    if not cfg.hf_hub_id:
        if cfg.url:  # timm would unpickle whatever is there
            raise ValueError(f'weights are not taken from a URL: download {cfg.url} and give it as `file`')
        return None, _nothing
    original_path = Path(cache_dir or Path(torch.hub.get_dir(), 'checkpoints'), f'{variant}.pth.tar')
    try:
        path = hub_download.fetch(cfg.hf_hub_id, cfg.hf_hub_filename or _FILES[0], cache_dir)
        found = _in_background(partial(hub_download.digest, path))
        return path, lambda: hub_download.check(path, found())  # which removes a damaged file: not while it is read
    except ValueError as error:
        is_there = isinstance(error, hub_download.RepoNotFoundError) or original_path.exists()
        if not (is_there and _is_of_original(variant, cfg)):
            raise
        _logger.warning('%s; taking the original file', error)
    return original.download_original(variant, original_path), _nothing


def _is_of_original(variant: str, cfg: PretrainedCfg) -> bool:
    """Whether the repository is the one for the original's weights, and nobody has asked for another by its name."""
    published = get_pretrained_cfg(variant)
    return (variant in original.FILES and cfg.source != 'hf-hub'
            and published is not None and cfg.hf_hub_id == published.hf_hub_id)


def _in_folder(folder: Path) -> Tuple[Path, Check]:
    """The weights in a folder that timm's or this package's programs have written."""
    found = [folder / name for name in _FILES if (folder / name).is_file()]
    if not found:
        raise ValueError(f'{folder} has no {" or ".join(_FILES)}')
    return found[0], _in_background(partial(_check_in_folder, found[0]))


def _check_in_folder(path: Path) -> None:
    config = _read_config(path.parent)
    # transformers copies what it doesn't know of a configuration, beside weights that it writes anew
    expected = None if 'transformers_version' in config else config.get('sha256')
    if expected is not None and file_sha256(path) != expected:
        raise ValueError(f'{path} is damaged: its checksum is not the one in config.json, {checkpoint.shown(expected)}')


def _read_config(folder: Path) -> Dict[str, Any]:
    with open(folder / 'config.json', encoding='utf-8') as file:  # timm has read it
        return json.load(file)
