"""Phrases that must not come back into docstrings, messages, help texts and pages."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Regular expressions for whole words, with the replacement that the failure proposes.
PHRASES = {
    r'anew': 'again, or a verb with re- (resample, restart)',
    r'lest': 'so that ... does not',
    r'in vain': 'without success, timed out',
    r'but for': 'except for',
    r'by and by': 'later',
    r'thereof|therein|whence|whither|hither': 'an antecedent',
    r'(?:a|each|every) step is made of': 'the global batch size is',
    r'go(?:es)? on from (?:there|here)': 'resumes',
    r'goes on with it': 'resumes it',
    r'held-out fifth': 'validation split (20 %)',
    r'(?:is|are) told': 'is reported',
    r'averaged weights': 'EMA weights',
    r'drawn from (?:a few |their |its |the )?points': 'sampled from points, interpolated from points',
    r"(?:a|the) network of others'?": 'another architecture',
    r'so many (?:steps|images|layers|points|epochs|seconds|digits|panels)': 'the number of',
    r'where to[.:]': 'path of the file, axes to draw on',
    r"what (?:it|this) (?:is|was) worth": 'effect, cost',
    r'wants? to call': 'references',
    r'(?:which|what) road': 'code path, dispatch',
    r'of nothing': 'empty, zero',
    r'whose\(\)': 'a name with a verb',
    r'comes? to (?:its|an|the) end': 'ends, finishes',
    r'no more than that': 'a sentence with a subject',
}
_PATTERNS = {words: re.compile(rf'(?<!\w)(?:{words})(?!\w)', re.IGNORECASE) for words in PHRASES}


def texts(path):
    """Return the line number and text of each page, docstring or string of a file."""
    if path.suffix == '.md':
        return [(1, path.read_text())]
    return [
        (node.lineno, node.value) for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def faults(path, name):
    """Return a line for each phrase in the texts of a file."""
    found = []
    for line, text in texts(path):
        joined = re.sub(r'\s+', ' ', text)  # a phrase may be broken over two lines
        found += [
            f'{name}:{line}: {match.group()!r}: write {PHRASES[words]}'
            for words, pattern in _PATTERNS.items() for match in pattern.finditer(joined)]
    return found


def checked_files():
    pages = [ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')]
    folders = ('smpconv_models', 'hub', 'benchmarks', 'examples', 'experiments')
    files = [*pages, *(ROOT / 'docs').glob('*.md'), ROOT / 'docs/conf.py', *ROOT.glob('*.py')]
    files += [path for folder in folders for path in (ROOT / folder).rglob('*.py')]
    return sorted(path.relative_to(ROOT).as_posix() for path in files)


@pytest.mark.parametrize('name', checked_files())
def test_texts_have_no_banned_phrase(name):
    found = faults(ROOT / name, name)
    assert not found, '\n' + '\n'.join(found)


@pytest.mark.parametrize('suffix, template', [
    ('.md', '# A page\n\nThe kernels {}\nhere.\n'),
    ('.py', 'def function():\n    """Return it.\n\n    The kernels {}.\n    """\n'),
    ('.py', 'def function():\n    raise ValueError(f"the kernels {} at {{function}}")\n'),
    ('.py', 'parser.add_argument("--name", help="the kernels {}")\n'),
], ids=['page', 'docstring', 'message', 'help'])
@pytest.mark.parametrize('phrase', ['are drawn anew', 'wait in vain', 'are told', 'drawn from\npoints'])
def test_a_planted_phrase_is_found(tmp_path, suffix, template, phrase):
    if suffix == '.py' and '"""' not in template:
        phrase = phrase.replace('\n', ' ')
    path = tmp_path / f'planted{suffix}'
    path.write_text(template.format(phrase))
    found, = faults(path, path.name)
    assert found.startswith(f'planted{suffix}:')


def test_only_whole_words_are_found(tmp_path):
    path = tmp_path / 'page.md'
    path.write_text('A new page: manewton, lestoil, isolated, but formats, install the told. Inaverage weights.\n')
    assert not faults(path, path.name)
