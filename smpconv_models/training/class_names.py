"""Order of class names, and names of classes and files in messages."""
import re
from typing import Any, Iterable, List, Tuple

from smpconv_models import checkpoint


def natural_key(name: str) -> Tuple[List[Any], str]:
    """Return a key that sorts as timm's ``natural_key``, with ties broken by the name itself.

    timm's key is the same for ``a`` and ``A``, and for ``1`` and ``01``. Sorting a set by timm's key alone leaves such
    names in an order that differs from process to process. timm's key also fails for names such as ``1²2``.
    """
    parts = re.split(r'(\d+)', name.lower())  # text and digits alternate
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def in_order(names: Iterable[str]) -> List[str]:
    """Return the distinct names, sorted by :func:`natural_key`."""
    return sorted(set(names), key=natural_key)


def shown(name: str) -> str:
    """Return a name for messages, not shortened, and escaped so that no two names look alike."""
    return checkpoint.printable(name, limit=None)


def listed(names: Iterable[str], limit: int = 5) -> str:
    """Return the first ``limit`` names as a sorted list for messages."""
    return f'[{", ".join(quoted(name) for name in in_order(names)[:limit])}]'


def quoted(name: str) -> str:
    """Return a name for messages, as :func:`shown` does, in quotes."""
    quote = '"' if "'" in name else "'"
    return f'{quote}{shown(name)}{quote}'
