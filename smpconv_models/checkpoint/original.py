"""The original release's weight files, from Google Drive, where its authors keep them.

The release is the code published with the paper (github.com/sangnekim/SMPConv).
"""
import os
import re
from html.parser import HTMLParser
from http.client import HTTPException
from pathlib import Path
from typing import Dict, List, Optional, Tuple, Union
from urllib.parse import urlencode

from huggingface_hub.utils import WeakFileLock

from smpconv_models.utils.errors import first_line

from ..utils import download
from . import check_file

# Model -> file, of images and of sequences; of permuted MNIST under a name of its own.
FILES = {
    'smpconv_t': '1xT9Y4cAj4I6rmNJ28-Mh4_APcsEqeJ1V',
    'smpconv_b': '16gd2KFnK1fgdEpOulnCYo2KaPl547zT9',
    'smpconv_cifar': '1aKwORBf-lplfdwB8WEcBRRAL7IA4ejth',
}
SEQUENCE_FILES = {
    'smpconv_smnist': '164qRzZs1kvuoOr34FLukGIQAI7PAYWUf',
    'smpconv_pmnist': '1no63cSqPgSJIkW8-iSvrAA1pFlurOKsh',
    'smpconv_scifar10': '1ilu1Oo74B4bC8cjkoIavPqJmEK34PhYg',
    'smpconv_characters': '1Jxy00LiTdjTXa-kYH7cJYX2s1A2yJSPK',
    'smpconv_speech_mfcc': '1AKmeyBDkv0v5qk8GF4vkecY6PgR2JpGP',
    'smpconv_speech': '15OWR-ZZIVu12pTtdCU1Dyv87yxwIhRlu',
}
_ADDRESS = 'https://drive.usercontent.google.com/download'


def download_original(model: str, path: Union[str, Path]) -> Path:
    """Downloads a model's file, unless it is there; goes on where an earlier download broke off.

    The release names no checksums; those in the file itself, of each part, are checked.

    Args:
        model: One of :data:`FILES` or :data:`SEQUENCE_FILES`.
        path: Where to; until it is whole, under this name with ``.part`` after it.

    Returns:
        The path.

    Raises:
        ValueError: The release has no such model, the file can't be downloaded, or is no checkpoint.
    """
    files = {**FILES, **SEQUENCE_FILES}
    if model not in files:
        raise ValueError(f'the original release has the weights of {sorted(files)}, not of {model}')
    path = Path(path)
    if path.exists():
        return path
    part = path.with_name(f'{path.name}.part')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(path.with_name(f'{path.name}.lock')):  # every process of a training run comes here
            if not path.exists():
                _fetch(files[model], part)
                _take(part, path)
    except (HTTPException, OSError) as error:
        kept = f'; what there is of it is kept in {part}' if part.exists() else ''
        raise ValueError(f'{model} cannot be downloaded from {_ADDRESS}: {first_line(error)}{kept}') from error
    return path


def _take(part: Path, path: Path) -> None:
    try:
        check_file(part)
    except ValueError:
        part.unlink()
        raise
    os.replace(part, path)


def _fetch(file_id: str, part: Path) -> None:
    """Appends what is missing. Of a large file Drive first sends a page with a form that asks whether one is sure."""
    query: Dict[str, str] = {'id': file_id, 'export': 'download'}
    for _ in range(3):
        answer = download.open_resumable(f'{_ADDRESS}?{urlencode(query)}', part)
        if answer is None:
            return
        with answer:
            if answer.headers.get_content_type() != 'text/html':
                return download.append(answer, part)
            page = answer.read(1 << 20).decode(errors='replace')
        form = _Form(page)
        if form.fields.get('id') != file_id:  # a login, say
            raise ValueError(f'Google Drive does not give the file now: {_title(page)}; try later')
        query = form.fields
    raise ValueError('Google Drive asks again and again whether to download; try later')


class _Form(HTMLParser):
    """The fields of a page's form, by name."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.fields: Dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: List[Tuple[str, Optional[str]]]) -> None:
        given = dict(attrs)
        if tag == 'input' and given.get('name'):
            self.fields[str(given['name'])] = given.get('value') or ''


def _title(page: str) -> str:
    found = re.search(r'<title>(.*?)</title>', page, re.S | re.I)
    return ' '.join(found[1].split())[:80] if found else 'it sends a page without a title'
