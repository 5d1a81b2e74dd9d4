"""What a misspelt name was meant to be."""
import difflib
from typing import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error's line: the nearest of the known names, or '' where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f'; did you mean {near[0]}?' if near else ''
