"""File of tuned tiles, as smpconv_models/ops/_triton/tuning.py reads it: a list of entries, one for each problem."""
import json
from pathlib import Path
from typing import Any, Collection, Dict, List, Tuple

import torch

from smpconv_models.ops._triton import tuning
from smpconv_models.utils import atomic_io

Entry = Dict[str, Any]
Key = Tuple[Any, ...]


def path_of(configs: Path, device: torch.device) -> Path:
    """Return the path of the file for a device's compute capability, in the folder ``configs``."""
    return configs / f'sm_{tuning._capability(device)}.json'


def key_of(entry: Entry) -> Key:
    """Return what an entry is for: kernel, precision, batch, height and width of the map, and size of the kernel."""
    size = tuple(entry['kernel_size'])
    return entry['kernel'], entry['mode'], entry['batch'], entry['height'], entry['width'], size


def read(path: Path) -> List[Entry]:
    """Return the entries of a file, none if there is no file."""
    return json.loads(path.read_text()) if path.exists() else []


def tiles(path: Path, key: Key) -> List[Any]:
    """Return the tile that a file has for a key, if any."""
    return [tuning.TILES[entry['kernel']](**entry['tile']) for entry in read(path) if key_of(entry) == key]


def replace(path: Path, keys: Collection[Key], entries: List[Entry]) -> None:
    """Replace the entries of some keys by ``entries``, and keep all others."""
    entries = [entry for entry in read(path) if key_of(entry) not in keys] + entries
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_io.atomic_write(path) as temporary:
        temporary.write_text('[\n' + ',\n'.join(map(_text, entries)) + '\n]\n' if entries else '[]\n')


def _text(entry: Entry) -> str:
    """Return an entry on three lines: what it is for, the tile, the source."""
    problem = {key: value for key, value in entry.items() if key not in ('tile', 'source')}
    return (
        f'  {json.dumps(problem)[:-1]},\n'
        f'   "tile": {json.dumps(entry["tile"])},\n'
        f'   "source": {json.dumps(entry["source"])}}}')
