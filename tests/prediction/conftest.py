import numpy as np
import pytest
import timm
import torch
from common import randomize_
from PIL import Image

TINY = dict(depths=(1, 1), dims=(4, 8), kernel_sizes=(7, 5), num_classes=4)
CLASSES = ['ant', 'bee', 'cat', 'dog']


@pytest.fixture(scope='session')
def tiny():
    """Network of the checkpoint."""
    return randomize_(timm.create_model('smpconv_nano', **TINY), 0).eval()


@pytest.fixture(scope='session')
def run_folder(tmp_path_factory, tiny):
    """Folder of a run with a checkpoint like those of train.py."""
    path = tmp_path_factory.mktemp('run')
    torch.save({
        'state_dict': tiny.state_dict(), 'model_kwargs': TINY, 'classes': CLASSES, 'epoch': 7,
        'args': {'model': 'smpconv_nano', 'mean': [0.3] * 3, 'std': [0.4] * 3, 'img_size': 16, 'crop_pct': 1.0},
    }, path / 'model_best.pth.tar')
    return path


@pytest.fixture(scope='session')
def photos(tmp_path_factory):
    """Folder of five readable images, of other modes, formats and sizes, in two folders, and one damaged image."""
    path = tmp_path_factory.mktemp('photos')
    (path / 'more').mkdir()
    random = np.random.default_rng(0)
    for name, mode, size in (
            ('a.png', 'RGB', (20, 30)), ('b.webp', 'RGB', (16, 16)), ('c.gif', 'L', (40, 18)),
            ('d.tiff', 'RGBA', (9, 9)), ('more/a.bmp', 'RGB', (31, 17))):
        shape = (*size[::-1], len(mode)) if len(mode) > 1 else size[::-1]
        Image.fromarray(random.integers(0, 256, shape, np.uint8), mode).save(path / name)
    (path / 'broken.jpg').write_bytes(b'\xff\xd8 no image')
    (path / 'notes.txt').write_text('no image')
    (path / '.hidden.png').write_bytes(b'no image')
    (path / '.thumbs').mkdir()
    (path / '.thumbs/t.png').write_bytes(b'no image')
    return path
