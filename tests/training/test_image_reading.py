"""Images of every depth and orientation, read alike in training, evaluation and figures."""
import io
import os
from pathlib import Path

import made
import numpy as np
import pytest
from PIL import Image
from test_data import make_folder, options
from test_sources import SOURCES, source

from smpconv_models.training.dataset_factory import create_dataset
from smpconv_models.training.datasets import ReadImage, Unreadable, orientation, to_8_bits

pytestmark = pytest.mark.usefixtures('logs_of_rank_0', 'quick_streams')

RAMP = (np.arange(256, dtype='uint16') * 257).reshape(16, 16)  # 8-bit values in 16 bits
GRAY = np.arange(256, dtype='uint8').reshape(16, 16)


def files(folder):
    """Paths to the ramp in each form with more than 8 bits."""
    Image.fromarray(RAMP).save(folder / 'png16.png')
    Image.fromarray(RAMP).save(folder / 'tiff16.tif')
    Image.fromarray(RAMP.astype('int32')).save(folder / 'tiff32.tif')
    Image.fromarray((RAMP / 65535).astype('float32')).save(folder / 'float.tif')
    (folder / 'big_endian.pgm').write_bytes(b'P5 16 16 65535 ' + RAMP.astype('>u2').tobytes())
    return sorted(folder.iterdir())


@pytest.mark.parametrize('mode', ['L', 'RGB'])
def test_deep_images_are_scaled_by_their_mode(tmp_path, mode):
    paths = files(tmp_path)
    assert len(paths) == 5
    for path in paths:
        image = ReadImage(mode)(path)
        assert image.mode == mode
        assert np.array_equal(np.asarray(image), np.asarray(Image.fromarray(GRAY).convert(mode))), path


def test_the_low_byte_is_dropped_as_in_colour():
    """Pillow reads a 16-bit RGB file by its upper bytes."""
    values = np.arange(0, 65536, 257, dtype='uint16').reshape(16, 16) + np.uint16(0)
    values[:8] += 250
    assert np.array_equal(np.asarray(to_8_bits(Image.fromarray(values))), values >> 8)


@pytest.mark.parametrize('pixels, told', [
    (np.full((2, 2), 1.5, 'float32'), 'float image must be from 0 to 1, got 1.5 to 1.5'),
    (np.full((2, 2), -0.5, 'float32'), 'float image must be from 0 to 1, got -0.5'),
    (np.full((2, 2), np.nan, 'float32'), 'got nan to nan'),
    (np.full((2, 2), 70000, 'int32'), 'integer image must be from 0 to 65535, got 70000'),
    (np.full((2, 2), -1, 'int32'), 'got -1 to -1'),
])
def test_values_out_of_range_are_refused(pixels, told):
    with pytest.raises(ValueError, match=told):
        ReadImage('RGB').convert(Image.fromarray(pixels))


@pytest.mark.parametrize('mode', ['1', 'LA', 'P', 'PA', 'RGBA', 'CMYK', 'YCbCr', 'L', 'RGB'])
@pytest.mark.parametrize('target', ['L', 'RGB'])
def test_other_modes_are_converted_by_pillow(mode, target):
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), 'uint8'))
    image = colours.convert('RGBA').convert(mode) if mode != 'PA' else colours.convert('P').convert('PA')
    if mode == 'P':
        image.info['transparency'] = 3
    assert np.array_equal(np.asarray(ReadImage(target).convert(image)), np.asarray(image.convert(target)))


# --- through the readers ---


def with_image(name, root, content, suffix, monkeypatch):
    """A source whose images are all this one."""
    def samples(split, classes=made.CLASSES, counts=made.SPLITS):
        start = 100 * list(counts).index(split)
        return [
            (class_name, label, f'{label}{start + index:03d}{suffix}', content)
            for label, class_name in enumerate(classes) for index in range(counts[split])]

    monkeypatch.setattr(made, 'samples', samples)
    return SOURCES[name][0](root)


def first(name, folder, in_chans=3, **changes):
    dataset = create_dataset(source(name, folder, **changes), SOURCES[name][2], in_chans, is_training=False)
    dataset.transform = lambda image: image
    return (next(iter(dataset)) if dataset.is_stream else dataset[0, 0])[0]


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize('in_chans', [1, 3])
@pytest.mark.parametrize('name', SOURCES)
def test_every_reader_scales_deep_images(tmp_path, monkeypatch, name, in_chans):
    content = encoded(Image.fromarray(RAMP), 'PNG')
    # the name of a file in a shard is the key under which its reader finds images
    folder = with_image(name, tmp_path / 'made', content, '.jpg' if name == 'wds' else '.png', monkeypatch)
    image = first(name, folder, in_chans)
    assert np.array_equal(np.asarray(image), np.asarray(Image.fromarray(GRAY).convert(image.mode)))
    assert image.mode == ('L' if in_chans == 1 else 'RGB')


def turned_jpeg():
    """A JPEG of 8 rows and 16 columns that asks to be turned, and its pixels."""
    pixels = np.zeros((8, 16, 3), 'uint8')
    pixels[:, 8:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(pixels), 'JPEG', exif=exif), pixels


@pytest.mark.parametrize('is_asked', [None, True])
@pytest.mark.parametrize('name', SOURCES)
def test_exif_orientation_is_honoured_if_asked(tmp_path, monkeypatch, caplog, name, is_asked):
    content, pixels = turned_jpeg()
    folder = with_image(name, tmp_path / 'made', content, '.jpg', monkeypatch)
    image = np.asarray(first(name, folder, exif_orientation=is_asked))
    # Hugging Face's library turns the images of its streams itself
    expected = np.rot90(pixels, -1) if is_asked or name == 'hfids' else pixels
    assert image.shape == expected.shape and np.abs(image.astype(int) - expected).mean() < 4
    told = [message for message in caplog.messages if 'EXIF orientation' in message]
    assert len(told) == (not is_asked and name not in ('hfids', 'wds'))
    assert all('15 of 15 checked images' in line and '--exif-orientation' in line for line in told)


def test_headers_are_looked_at_in_a_bounded_sample(tmp_path, caplog, monkeypatch):
    content, _ = turned_jpeg()
    for index in range(300):
        path = tmp_path / 'train' / 'ab'[index % 2] / f'{index}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    opened = []
    open_image = Image.open
    monkeypatch.setattr(Image, 'open', lambda file: opened.append(file) or open_image(file))
    monkeypatch.setattr('PIL.JpegImagePlugin.JpegImageFile.load', lambda image: pytest.fail('pixels were decoded'))
    create_dataset(options(tmp_path), 'train', 3, is_training=True)
    assert len(opened) == 64
    line, = caplog.messages
    assert "64 of 64 checked images have an EXIF orientation that is ignored" in line and str(tmp_path) in line


def test_orientation_in_a_png_is_found_without_pixels(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(GRAY).save(tmp_path / 'turned.png', exif=exif)
    monkeypatch.setattr('PIL.PngImagePlugin.PngImageFile.load', lambda image: pytest.fail('pixels were decoded'))
    with Image.open(tmp_path / 'turned.png') as image:
        assert orientation(image) == 3


def test_deep_images_are_reported(tmp_path, caplog):
    for name in 'ab':
        (tmp_path / 'val' / name).mkdir(parents=True)
        Image.fromarray(RAMP).save(tmp_path / 'val' / name / '0.png')
    create_dataset(options(tmp_path), 'val', 3, is_training=False)
    line, = caplog.messages
    assert '2 of 2 checked images have 16 or 32 bits' in line and str(tmp_path / 'val' / 'a' / '0.png') in line


def test_an_image_out_of_range_is_unreadable(tmp_path):
    for name in 'ab':
        (tmp_path / 'val' / name).mkdir(parents=True)
        Image.fromarray(np.full((4, 4), 255, 'float32')).save(tmp_path / 'val' / name / '0.tif')
    sample = create_dataset(options(tmp_path, dataset='torch/folder'), 'val', 3, is_training=False)[0, 0]
    assert isinstance(sample, Unreadable)
    assert sample.name.endswith('a/0.tif') and 'must be from 0 to 1, got 255 to 255' in sample.reason


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 20 20
%%EndComments
newpath 0 0 moveto 20 20 lineto stroke
showpage
%%EOF
"""


@pytest.mark.parametrize('dataset', ['', 'torch/folder'])
def test_no_program_is_started_for_postscript_in_an_image_file(tmp_path, monkeypatch, dataset):
    """Pillow would start the program `gs` of the search path for a file with this content, whatever its name."""
    program = tmp_path / 'bin/gs'
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho started >> {tmp_path}/log\n')
    program.chmod(0o755)
    monkeypatch.setenv('PATH', f'{program.parent}:{os.environ["PATH"]}')
    make_folder(tmp_path / 'data')
    path = next((tmp_path / 'data/train').glob('*/*.png'))
    path.write_bytes(EPS)
    samples = create_dataset(options(tmp_path / 'data', dataset=dataset), 'train', 3, is_training=True)
    unreadable = [sample for index in range(len(samples)) if isinstance(sample := samples[0, index], Unreadable)]
    assert [Path(found.name) for found in unreadable] == [path] and not (tmp_path / 'log').exists()
