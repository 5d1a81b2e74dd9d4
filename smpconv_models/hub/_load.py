"""Loading of models from repositories of the Hub and from folders, whose configurations are validated."""
import json
from pathlib import Path
from typing import Any, Union

import timm

from smpconv_models.models import check_arguments
from smpconv_models.utils import hub_download
from smpconv_models.utils.errors import first_line

# Files of a folder or repository.
WEIGHTS, CONFIG, CARD = 'model.safetensors', 'config.json', 'README.md'


def load(where: Union[str, Path], cache_dir: Any = None, **kwargs: Any) -> Any:
    """Create a model of this package with its weights from a repository of the Hub or a folder.

    Args:
        where: ``OWNER/NAME``, ``OWNER/NAME@REVISION``, or a folder.
        cache_dir: Folder of the cache, by default the Hub client's.
        kwargs: Arguments of ``timm.create_model``, e.g. ``num_classes``, ``features_only``, ``kernel_scale``.

    Raises:
        ValueError: If there is no such repository or folder, its configuration is not that of a model of this package,
            or its weights do not fit.
    """
    if Path(where).is_dir():
        folder = Path(where)
    else:
        folder, other = (
            hub_download.download_verified(str(where), name, cache_dir).parent for name in (WEIGHTS, CONFIG))
        if folder != other:
            raise ValueError(f'{where} was changed while it was downloaded: load it again')
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
