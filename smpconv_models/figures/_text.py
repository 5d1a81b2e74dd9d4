"""Names from outside in plots: fonts of the system for the characters that the default font lacks."""
from functools import lru_cache
from typing import Any, Collection, Dict, FrozenSet, List, Sequence, Tuple

from matplotlib import font_manager, rcParams

# Font with a box for each character, which comes with matplotlib.
_LAST_RESORT = 'Last Resort High-Efficiency'


def drawable(texts: Sequence[str]) -> Tuple[List[str], Dict[str, Any]]:
    """Return texts in which all characters can be drawn, and the properties to draw these texts with.

    Characters that no font of the system has are escaped, as in Python: matplotlib would draw the same box for each.
    """
    families = list(rcParams['font.family'])
    characters = frozenset(''.join(texts)) - {'\n'}
    missing = characters - _covered(families, characters)
    families += _fallbacks(missing)
    missing -= _covered(families, missing)
    escapes = {ord(character): character.encode('unicode_escape').decode() for character in missing}
    return [text.translate(escapes) for text in texts], {'fontfamily': families, 'parse_math': False}


@lru_cache(maxsize=16)
def _fallbacks(missing: FrozenSet[str]) -> List[str]:
    """Return installed fonts that have these characters together, as far as there are any."""
    if not missing:
        return []
    families = sorted({
        entry.name for entry in font_manager.fontManager.ttflist
        if (entry.style, entry.weight) == ('normal', 400) and entry.name != _LAST_RESORT})
    coverage = {family: _covered([family], missing) for family in families}
    chosen: List[str] = []
    while missing & frozenset().union(*coverage.values()):
        chosen.append(max(families, key=lambda family: len(coverage[family] & missing)))
        missing -= coverage[chosen[-1]]
    return chosen


def _covered(families: Collection[str], characters: FrozenSet[str]) -> FrozenSet[str]:
    """Return those of the characters that one of the fonts has."""
    found = set()
    for family in families:
        try:
            path = font_manager.findfont(font_manager.FontProperties(family=[family]), fallback_to_default=False)
            charmap = font_manager.get_font(path).get_charmap()
        except (OSError, RuntimeError, ValueError):  # removed or damaged since matplotlib listed it
            continue
        found |= {character for character in characters if ord(character) in charmap}
    return frozenset(found)
