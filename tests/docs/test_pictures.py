"""The pictures that docs/pictures.py draws."""
import numpy as np
import programs
import pytest
from PIL import Image
from programs import ROOT, load

pictures = load('docs/pictures')


@pytest.mark.parametrize('name', [
    'speed', 'networks', 'block', 'layers', 'hero',
    pytest.param('fields', marks=pytest.mark.slow)])    # 20 s, of three networks
def test_pictures_are_drawn_as_they_are_in_the_repository(name, folder, monkeypatch):
    monkeypatch.setattr(pictures, 'FOLDER', folder)
    for run in ('resnet', 'convnext'):
        (folder / 'output' / run).symlink_to(folder / 'output/digits')
    assert programs.run(pictures.main, name) == 0
    drawn = {path.name for path in folder.glob('*.png')}
    assert drawn == {path.name for path in (ROOT / 'docs').glob(f'{name}*.png')}
    for path in folder.glob('*.png'):
        with Image.open(path) as picture, Image.open(ROOT / 'docs' / path.name) as kept:
            assert picture.size == pytest.approx(kept.size, rel=0.01)  # Matplotlib's versions differ by a pixel
            colors = np.asarray(picture.convert('RGBA'))
            assert colors[..., :3][colors[..., 3] > 0].std() > 20
            is_transparent = colors[..., 3].min() == 0
            assert is_transparent == (name in ('hero', 'speed', 'networks'))


def test_fields_of_one_run(folder, monkeypatch):
    monkeypatch.setattr(pictures, 'FOLDER', folder)
    monkeypatch.setattr(pictures.figures, 'effective_receptive_field', lambda model, images: np.eye(16) + 0.1)
    assert programs.run(pictures.main, 'fields', '--runs', 'output/digits') == 0
    assert (folder / 'fields.png').exists()


@pytest.mark.parametrize(('arguments', 'message'), [
    (['fields', '--runs', 'output'], 'error: output/summary.json cannot be read: '),
    (['hero', '--checkpoint', 'output/nothing'], 'output/nothing'),
])
def test_a_missing_run_is_one_line(folder, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        pictures.main(arguments)
    *_, line = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and message in line


def test_the_smallest_square_lies_where_the_contributions_are():
    field = np.zeros((16, 16))
    field[8:12, 3:7] = 1
    assert pictures._smallest_square(field, 1) == (3, 8, 4)
    assert pictures._smallest_square(field, 0.5)[2] == 3  # 9 of 16 elements
    assert pictures._smallest_square(np.ones((16, 16)), 1) == (0, 0, 16)
