"""The pictures that docs/pictures.py draws."""
import numpy as np
import programs
import pytest
from PIL import Image
from programs import ROOT, load

pictures = load('docs/pictures')


@pytest.mark.parametrize('name', ['speed', 'block', 'layers', 'hero'])
def test_pictures_are_drawn_as_they_are_in_the_repository(name, folder, monkeypatch):
    monkeypatch.setattr(pictures, 'FOLDER', folder)
    assert programs.run(pictures.main, name) == 0
    drawn = {path.name for path in folder.glob('*.png')}
    assert drawn == {path.name for path in (ROOT / 'docs').glob(f'{name}*.png')}
    for path in folder.glob('*.png'):
        with Image.open(path) as picture, Image.open(ROOT / 'docs' / path.name) as kept:
            assert picture.size == pytest.approx(kept.size, rel=0.01)  # Matplotlib's versions differ by a pixel
            colors = np.asarray(picture.convert('RGBA'))
            assert colors[..., :3][colors[..., 3] > 0].std() > 20
            is_transparent = colors[..., 3].min() == 0
            assert is_transparent == (name in ('hero', 'speed'))
