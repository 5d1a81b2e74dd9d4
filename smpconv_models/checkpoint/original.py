"""Weights of the original release: their download, and their names and shapes in this package.

The release is the code published with the paper (github.com/sangnekim/SMPConv). Its files are pickled dictionaries on
Google Drive. timm's CheckpointSaver wrote those of the ImageNet models; the others come from the release's own trainer,
with the weights under ``model``.
"""
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple, Union
from urllib.parse import urlencode

from torch import Size, Tensor

from ..utils.download import WrongFileError, fetch_checked, locked
from .files import check_file

StateDict = Dict[str, Tensor]
Rules = Tuple[Tuple[str, Union[str, Callable[[re.Match], str]]], ...]

# Model -> file on Google Drive. smpconv_pmnist is permuted MNIST, which has a file of its own.
GDRIVE_IDS = {
    'smpconv_t': '1xT9Y4cAj4I6rmNJ28-Mh4_APcsEqeJ1V',
    'smpconv_b': '16gd2KFnK1fgdEpOulnCYo2KaPl547zT9',
    'smpconv_cifar': '1aKwORBf-lplfdwB8WEcBRRAL7IA4ejth',
}
SEQUENCE_GDRIVE_IDS = {
    'smpconv_smnist': '164qRzZs1kvuoOr34FLukGIQAI7PAYWUf',
    'smpconv_pmnist': '1no63cSqPgSJIkW8-iSvrAA1pFlurOKsh',
    'smpconv_scifar10': '1ilu1Oo74B4bC8cjkoIavPqJmEK34PhYg',
    'smpconv_characters': '1Jxy00LiTdjTXa-kYH7cJYX2s1A2yJSPK',
    'smpconv_speech_mfcc': '1AKmeyBDkv0v5qk8GF4vkecY6PgR2JpGP',
    'smpconv_speech': '15OWR-ZZIVu12pTtdCU1Dyv87yxwIhRlu',
}
_ADDRESS = 'https://drive.usercontent.google.com/download'

# Release name -> our name, applied in order to every key. The ImageNet models of the release list mixer and FFN blocks
# alternately; ours pair them.
_IMAGENET: Rules = (
    (r'^transitions\.(\d+)\.(\d+)\.', lambda m: f'stages.{int(m[1]) + 1}.downsample.{m[2]}.'),
    (r'^stages\.(\d+)\.blocks\.(\d+)\.',
     lambda m: f'stages.{m[1]}.blocks.{int(m[2]) // 2}.{("mixer", "ffn")[int(m[2]) % 2]}.'),
    (r'\.large_kernel\.smp\.', '.large_kernel.large.'),
    (r'\.large_kernel\.small_conv\.', '.large_kernel.small.'),
    (r'\.(prelkb_bn|preffn_bn|bn)\.', '.norm.'),
    (r'\.weight_coord$', '.coords'),
    (r'\.weights$', '.weight'),
    (r'^head\.', 'head.fc.'),
)

# Networks for sequences and small images. The layers of their stem have no prefix.
_SMALL: Rules = (
    (r'(^|\.)cconv(\d)\.(Kernel\.)?', r'\1conv\2.large.conv.'),
    (r'(^|\.)cconv(\d)s\.', r'\1conv\2.small.conv.'),
    (r'(^|\.)norm(\d)\.', r'\1conv\2.large.norm.'),
    (r'(^|\.)norm(\d)s\.', r'\1conv\2.small.norm.'),
    (r'^conv1\.', 'stem.'),
    (r'\.shortcut\.0\.', '.shortcut.'),
    (r'\.weight_coord$', '.coords'),
    (r'\.weights$', '.weight'),
    (r'\.train_length$', '._extra_state'),
    (r'^backbone\.', 'blocks.'),
    (r'^finallyr\.', 'head.'),
    (r'^out_layer\.', 'head.fc.'),
)


def is_original(state_dict: StateDict) -> bool:
    """Return whether the names are those of a model of the original release."""
    return any(key.endswith('.weight_coord') for key in state_dict)


def convert_original(state_dict: StateDict) -> StateDict:
    """Return a state dict of the original release under our names and shapes.

    The sampling grids in the files (``kernel_coord``) are left out, as our layers compute them. The network for small
    images lists its blocks without stages; here a stage begins where the channels change. Tensors keep shapes that the
    release does not have.
    """
    is_small = any(key.endswith('.Kernel.weight_coord') for key in state_dict)
    positions = _stages_of_blocks(state_dict) if is_small else {}
    converted = {}
    for key, tensor in state_dict.items():
        if is_small:
            if tensor.ndim > 1 and (key.endswith('.radius') or key == 'out_layer.weight'):
                tensor = tensor.flatten(1)
            key = re.sub(r'^blocks\.(\d+)\.', lambda m: positions.get(int(m[1]), m[0]), key)
        elif key.endswith('.kernel_coord'):
            continue
        elif key.endswith(('.weight_coord', '.weights')):
            tensor = tensor.squeeze(0)
        elif key.endswith('.radius'):
            tensor = tensor.flatten()
        for pattern, replacement in _SMALL if is_small else _IMAGENET:
            key = re.sub(pattern, replacement, key)
        converted[key] = tensor
    return converted


def _stages_of_blocks(state_dict: StateDict) -> Dict[int, str]:
    """Return our prefix of each block, ``stages.S.B.``: a stage for each run of blocks with the same channels."""
    pattern = re.compile(r'^blocks\.(\d+)\.cconv1\.Kernel\.radius$')
    widths = {int(found[1]): tensor.shape[:1] for key, tensor in state_dict.items() if (found := pattern.match(key))}
    positions: Dict[int, str] = {}
    stage, index, previous = -1, 0, Size()
    for block, width in sorted(widths.items()):
        stage, index = (stage, index + 1) if stage >= 0 and width == previous else (stage + 1, 0)
        positions[block], previous = f'stages.{stage}.{index}.', width
    return positions


def download_original(model: str, path: Union[str, Path]) -> Path:
    """Download a model's file to ``path``, or resume its download, unless the file exists; return ``path``.

    The release names no checksums; those of the parts in the zip file are checked. Until the file is complete, its name
    ends in ``.part``.

    Raises:
        ValueError: If the release has no such model, the file cannot be downloaded, or it is no checkpoint.
    """
    files = {**GDRIVE_IDS, **SEQUENCE_GDRIVE_IDS}
    if model not in files:
        raise ValueError(f'the original release has the weights of {sorted(files)}, not of {model}')
    path = Path(path)
    query = {'id': files[model], 'export': 'download'}
    if not path.exists():
        with locked(path.parent, path.name):  # every process of a training run calls this
            if not path.exists():
                fetch_checked(f'{_ADDRESS}?{urlencode(query)}', path, _check_download, _Confirmation(files[model]))
    return path


def _check_download(path: Path) -> None:
    try:
        check_file(path)
    except ValueError as error:
        if isinstance(error.__cause__, OSError):
            raise
        raise WrongFileError(str(error)) from error


class _Confirmation:
    """Answers to the page that Google Drive sends before a large file: a form that asks for confirmation."""

    def __init__(self, file_id: str, attempts: int = 2) -> None:
        self.file_id, self.attempts = file_id, attempts

    def __call__(self, page: str) -> str:
        fields = _Form(page).fields
        if fields.get('id') != self.file_id:  # a login, for example
            found = re.search(r'<title>(.*?)</title>', page, re.S | re.I)
            title = ' '.join(found[1].split())[:80] if found else 'it sends a page without a title'
            raise ValueError(f'Google Drive does not give the file now: {title}; try later')
        if not self.attempts:
            raise ValueError('Google Drive asks again and again whether to download; try later')
        self.attempts -= 1
        return f'{_ADDRESS}?{urlencode(fields)}'


class _Form(HTMLParser):
    """Fields of a page's form, by name."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.fields: Dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: List[Tuple[str, Optional[str]]]) -> None:
        attributes = dict(attrs)
        if tag == 'input' and attributes.get('name'):
            self.fields[str(attributes['name'])] = attributes.get('value') or ''
