"""Markdown pages of the repository: their code blocks, commands, links and headings."""
import re
import shlex
from typing import NamedTuple

from programs import ROOT

PAGES = [ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')]
PAGES += sorted((ROOT / 'docs').glob('*.md'))
_FENCE = re.compile(r'^```([^\n]*)\n(.*?)^```$', re.M | re.S)


class Block(NamedTuple):
    """Code block of a page; ``output`` is the text of an unnamed block that follows it directly."""
    line: int
    language: str
    text: str
    output: str | None


class Command(NamedTuple):
    """Words of a command line of a page, and the line of the page."""
    line: int
    words: list


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page):
    text = page.read_text()
    found = list(_FENCE.finditer(text))
    for fence, following in zip(found, [*found[1:], None]):
        shows_output = following and not following[1] and not text[fence.end():following.start()].strip()
        yield Block(_line(text, fence.start()), fence[1], fence[2], following[2] if shows_output else None)


def commands(page):
    """Commands of bash blocks, and those in the text, such as beside a figure."""
    for block in blocks(page):
        if block.language == 'bash':
            lines = [shlex.split(line, comments=True) for line in block.text.replace('\\\n', ' ').splitlines()]
            yield from (Command(block.line, words) for words in lines if words)
    text = without_blocks(page.read_text())
    for span in re.finditer(r'(?<!`)`((?:make|pip install|pytest|python|torchrun)\s[^`]+)`', text):
        if not re.fullmatch(r'python -m [\w.]+', span[1]):  # names a program without its arguments
            yield Command(_line(text, span.start()), shlex.split(span[1]))


def without_blocks(text):
    """The text with empty lines in place of the code blocks."""
    return _FENCE.sub(lambda fence: '\n' * fence[0].count('\n'), text)


def anchors(page):
    """The anchors of a page's headings, as code hosts and MyST name them."""
    headings = re.findall(r'^#+ (.*)$', without_blocks(page.read_text()), re.M)
    slugs = [re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings]
    before = [slugs[:index].count(slug) for index, slug in enumerate(slugs)]
    return [f'{slug}-{count}' if count else slug for slug, count in zip(slugs, before)]


def links(page):
    """Targets of links and pictures, without those of other sites."""
    text = without_blocks(page.read_text())
    targets = re.findall(r'\]\(([^)\s]+)\)', text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    return [target for target in targets if '://' not in target]


def paths(page):
    """Paths in the repository that a page names without a link, such as `docs/models.md`."""
    folders = 'benchmarks|docs|examples|experiments|hub|recipes|smpconv_models|tests'
    return re.findall(rf'`((?:{folders})/(?:[\w/]+\.\w+|(?:\w+/)*))`', without_blocks(page.read_text()))


def _line(text, position):
    return text.count('\n', 0, position) + 1
