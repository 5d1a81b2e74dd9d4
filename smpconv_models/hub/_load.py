"""Models from repositories of the Hub and from folders, of which nothing is believed unchecked."""
import json
from pathlib import Path
from typing import Any, Union

import timm

from smpconv_models.models import check_arguments
from smpconv_models.utils import hub_download
from smpconv_models.utils.errors import first_line

# Of a folder or repository.
WEIGHTS, CONFIG, CARD = 'model.safetensors', 'config.json', 'README.md'


def load(where: Union[str, Path], cache_dir: Any = None, **kwargs: Any) -> Any:
    """A model of this package with its weights, from a repository of the Hub or a folder: ``timm.create_model``.

    Args:
        where: ``OWNER/NAME``, ``OWNER/NAME@REVISION``, or a folder.
        cache_dir: The Hub client's, by default its own.
        kwargs: More of ``timm.create_model``, e.g. ``num_classes``, ``features_only``, ``kernel_scale``.

    Raises:
        ValueError: Neither is there, its configuration is not one of a model of this package, or its weights don't fit.
    """
    folder = Path(where) if Path(where).is_dir() else _fetch(str(where), cache_dir)
    known = timm.list_models('smpconv*')
    try:
        config = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
        if config['architecture'] not in known:
            raise ValueError(f'its architecture must be one of {known}, got {config["architecture"]!r:.200}')
        check_arguments(config['architecture'], config.get('model_args', {}))
        return timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs)
    except (AssertionError, AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = f'it has no {error}' if isinstance(error, KeyError) else first_line(error)
        raise ValueError(f'{where} cannot be loaded: {reason}') from error


def _fetch(repo: str, cache_dir: Any) -> Path:
    """The folder in the cache that has the configuration and the weights of a repository, both checked."""
    weights, config = (hub_download.download_verified(repo, name, cache_dir) for name in (WEIGHTS, CONFIG))
    if weights.parent != config.parent:
        raise ValueError(f'{repo} was changed while it was downloaded: load it again')
    return config.parent
