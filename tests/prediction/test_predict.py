"""`smpconv_models.predict`, and the program of this name."""
import csv
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import programs
import pytest
import timm
import torch
from PIL import Image

import smpconv_models
from smpconv_models import checkpoint, hub
from smpconv_models.prediction import Predictor, inputs
from smpconv_models.prediction.cli import main
from smpconv_models.prediction.predictor import PredictOptions

CLASSES = ['ant', 'bee', 'cat', 'dog']


def logits(tiny, image):
    """Logits by hand: resized, cropped and normalized as the checkpoint describes."""
    size = 16
    width, height = image.size
    scale = size / min(width, height)
    resized = image.convert('RGB').resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    pixels = np.asarray(resized.crop((left, top, left + size, top + size)), np.float32) / 255
    with torch.no_grad():
        return tiny(torch.from_numpy((pixels - 0.3) / 0.4).permute(2, 0, 1)[None])[0]


@pytest.fixture
def predicted(capsys):
    """Run the program; return its exit code and the rows of its standard output."""
    def call(*argv):
        code = programs.run(main, *argv)
        return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return call


def test_probabilities_are_those_of_the_checkpoint(tiny, run_folder, photos):
    prediction, = smpconv_models.predict(photos / 'b.webp', run_folder, topk=3)
    expected = logits(tiny, Image.open(photos / 'b.webp')).softmax(0)
    order = expected.argsort(descending=True)[:3].tolist()
    assert prediction.indices == order
    assert prediction.labels == [CLASSES[index] for index in order]
    torch.testing.assert_close(torch.tensor(prediction.probabilities), expected[order], rtol=1e-4, atol=1e-5)


def test_images_in_memory_equal_their_files(run_folder, photos):
    path = photos / 'a.png'
    image = Image.open(path)
    of_file, = smpconv_models.predict(str(path), run_folder)
    others = smpconv_models.predict([image, np.asarray(image), io.BytesIO(path.read_bytes())], run_folder, batch_size=2)
    assert [other.image for other in others] == ['image 0', 'image 1', 'image 2']
    for other in others:
        assert other.indices == of_file.indices
        np.testing.assert_allclose(other.probabilities, of_file.probabilities, rtol=1e-5)


@pytest.mark.parametrize('workers', [0, 1])
def test_a_folder_has_a_prediction_for_each_image(run_folder, photos, workers):
    found = smpconv_models.predict(photos, run_folder, topk=9, batch_size=2, workers=workers)
    names = [Path(each.image).relative_to(photos).as_posix() for each in found]
    assert names == ['a.png', 'b.webp', 'broken.jpg', 'c.gif', 'd.tiff', 'more/a.bmp']
    assert [bool(each.error) for each in found] == [False, False, True, False, False, False]
    assert all(sorted(each.indices) == [0, 1, 2, 3] for each in found if not each.error)


def test_features_are_the_inputs_of_the_classifier(tiny, run_folder, photos):
    first, broken = smpconv_models.predict([photos / 'a.png', photos / 'broken.jpg'], run_folder, 4, features=True)
    assert broken.features is None
    found = tiny.get_classifier()(torch.from_numpy(first.features)).softmax(0).sort(descending=True).values
    np.testing.assert_allclose(first.probabilities, found.detach().numpy(), rtol=1e-4)


def test_the_name_stays_a_function_after_the_import_of_the_module(run_folder, photos):
    import smpconv_models.predict  # binds the module to the function's name
    assert len(smpconv_models.predict(photos / 'a.png', run_folder)) == 1


def test_a_converted_folder_and_its_name(run_folder, photos, tmp_path):
    hub.convert(run_folder / 'model_best.pth.tar', tmp_path / 'folder')
    of_run = smpconv_models.predict(photos / 'a.png', run_folder)[0]
    for name in (tmp_path / 'folder', f'local-dir:{tmp_path / "folder"}'):
        prediction, = smpconv_models.predict(photos / 'a.png', name)
        assert prediction.labels == of_run.labels
        np.testing.assert_allclose(prediction.probabilities, of_run.probabilities, rtol=1e-4)


def test_classes_of_imagenet_have_names(tmp_path):
    model = timm.create_model('smpconv_nano', num_classes=1000)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    loaded, = inputs.ModelSource(checkpoints=[str(tmp_path / 'weights.pth')]).load()
    assert Predictor(loaded).classes[281] == 'tabby, tabby cat'


@pytest.mark.parametrize(('images', 'message'), [
    ([3], 'expected a path, a PIL image or an array of uint8, got int'),
    ('GONE.png', 'no such file or folder: GONE.png'),
    ([torch.zeros(3, 8, 8)], 'got Tensor'),
    (np.zeros((3, 8, 8), np.uint8), r'\(H, W, 3\) of uint8, got \(3, 8, 8\) of uint8'),
    (np.zeros((8, 8)), 'got \\(8, 8\\) of float64'),
])
def test_what_is_no_image_is_an_error(run_folder, images, message):
    with pytest.raises(ValueError, match=message):
        smpconv_models.predict(images, run_folder)


def test_models_that_cannot_predict(photos, tmp_path):
    for name, create, message in (
            ('smpconv_sdigits', smpconv_models.create_sequence_model, 'takes sequences of 64 steps'),
            ('smpconv_nano', timm.create_model, 'has no classifier')):
        kwargs = {'num_classes': 0} if name == 'smpconv_nano' else {}
        torch.save({
            'state_dict': create(name, **kwargs).state_dict(), 'model_kwargs': kwargs, 'args': {'model': name},
        }, tmp_path / 'weights.pth')
        with pytest.raises(ValueError, match=message):
            smpconv_models.predict(photos, tmp_path / 'weights.pth')


def test_a_size_that_the_model_cannot_take(photos):
    loaded = inputs.LoadedModel('a ConvNeXt', timm.create_model('test_convnext').eval(), checkpoint.Description())
    with pytest.raises(ValueError, match=r'a ConvNeXt cannot take images of \(3, 1, 1\)'):
        list(Predictor(loaded, PredictOptions(img_size=1)).predict([photos / 'a.png']))


def test_names_of_another_number_of_classes(run_folder, photos, tmp_path):
    loaded = torch.load(run_folder / 'model_best.pth.tar')
    torch.save({**loaded, 'classes': CLASSES[:3]}, tmp_path / 'other.pth')
    with pytest.raises(ValueError, match='expected 4 class names, got 3'):
        smpconv_models.predict(photos, tmp_path / 'other.pth')


# --- the program ---


def test_lines_of_json_for_a_pipe(predicted, run_folder, photos, capsys):
    code, rows = predicted(photos, '--checkpoint', run_folder, '--topk', 2)
    assert code == 1  # one cannot be read
    assert len(rows) == 6 and [len(row.get('predictions', [])) for row in rows] == [2, 2, 0, 2, 2, 2]
    assert rows[2] == {'image': str(photos / 'broken.jpg'), 'error': rows[2]['error']}
    assert {'index', 'label', 'probability'} == rows[0]['predictions'][0].keys()
    code, _ = predicted(photos / 'a.png', '--checkpoint', run_folder)
    assert code == 0


def test_an_unreadable_image_is_named(run_folder, photos, capsys):
    assert programs.run(main, photos / 'broken.jpg', '--checkpoint', run_folder) == 1
    assert f'{photos / "broken.jpg"} cannot be read: ' in capsys.readouterr().err


def test_text_for_a_terminal(run_folder, photos, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    programs.run(main, photos / 'a.png', photos / 'broken.jpg', '--checkpoint', run_folder, '--topk', 1)
    path, line = capsys.readouterr().out.splitlines()
    assert path == str(photos / 'a.png')
    assert line.split()[1:] in [['%', name] for name in CLASSES]


def test_files_of_the_results(predicted, run_folder, photos, tmp_path):
    folder, table, values = tmp_path / 'heat', tmp_path / 'results.csv', tmp_path / 'results.json'
    _, rows = predicted(
        photos, '--checkpoint', run_folder, '--output', table, '--features', tmp_path / 'f.npy', '--heat-map', folder)
    with open(table, newline='') as file:
        read = list(csv.DictReader(file))
    assert [row['image'] for row in read] == [row['image'] for row in rows]
    assert read[0]['label_1'] == rows[0]['predictions'][0]['label'] and read[2]['label_1'] == ''
    assert read[2]['error'] and not read[0]['error']
    features = np.load(tmp_path / 'f.npy')
    assert features.shape == (6, 8) and features.dtype == np.float32
    assert np.isnan(features).all(1).tolist() == [False, False, True, False, False, False]
    assert sorted(path.name for path in folder.iterdir()) == [
        'a-2.heat.png', 'a.heat.png', 'b.heat.png', 'c.heat.png', 'd.heat.png']
    for row in rows:
        if 'error' not in row:
            with Image.open(row['heat_map']) as picture:
                assert min(picture.size) >= 224 and np.asarray(picture).std() > 5
    predicted(photos, '--checkpoint', run_folder, '--output', values)
    assert [row['image'] for row in json.loads(values.read_text())] == [row['image'] for row in rows]


def test_a_failed_run_leaves_earlier_results(run_folder, photos, tmp_path, capsys):
    earlier = tmp_path / 'results.csv'
    earlier.write_text('image\na.png\n')
    with pytest.raises(SystemExit):
        programs.run(main, photos, '--checkpoint', run_folder, '--output', earlier, '--device', 'tpu9')
    assert earlier.read_text() == 'image\na.png\n'


def test_text_of_a_terminal_is_escaped(run_folder, photos, tmp_path, capsys, monkeypatch):
    loaded = torch.load(run_folder / 'model_best.pth.tar')
    torch.save({**loaded, 'classes': ['\x1b[2Jant\nbee', *CLASSES[1:]]}, tmp_path / 'other.pth')
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    programs.run(main, photos / 'a.png', '--checkpoint', tmp_path / 'other.pth')
    out = capsys.readouterr().out
    assert '\x1b' not in out and len(out.splitlines()) == 5


@pytest.mark.skipif(os.name == 'nt', reason='folders have no such permissions')
def test_a_folder_that_cannot_be_read_is_named(monkeypatch, run_folder, photos, tmp_path, capsys):
    """The system's error is simulated, as it never occurs for root."""
    (tmp_path / 'photos/closed').mkdir(parents=True)
    (tmp_path / 'photos/a.png').write_bytes((photos / 'a.png').read_bytes())
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == 'closed':
            raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        return scandir(path)
    monkeypatch.setattr(os, 'scandir', refuse)
    line = programs.refused(main, capsys, tmp_path / 'photos', '--checkpoint', run_folder)
    assert f'{tmp_path}/photos/closed cannot be read: Permission denied' in line


def test_an_image_on_standard_input(run_folder, photos):
    command = [sys.executable, '-m', 'smpconv_models.predict', '-', '--checkpoint', run_folder]
    with open(photos / 'b.webp', 'rb') as file:
        done = subprocess.run(command, stdin=file, capture_output=True, text=True, check=True)
    row = json.loads(done.stdout)
    assert row['image'] == '-'
    assert row['predictions'][0]['index'] == smpconv_models.predict(photos / 'b.webp', run_folder)[0].indices[0]


def test_an_interrupt_keeps_the_results(run_folder, photos, tmp_path):
    copies = tmp_path / 'copies'
    copies.mkdir()
    for index in range(3000):
        (copies / f'{index:04}.webp').symlink_to(photos / 'b.webp')
    command = [sys.executable, '-m', 'smpconv_models.predict', copies, '--checkpoint', run_folder, '-b', '1']
    with subprocess.Popen(
            [*command, '--output', tmp_path / 'results.json'], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        process.stdout.readline()
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.count('\n') == 1 and 'interrupted; ' in errors
    assert 1 <= len(json.loads((tmp_path / 'results.json').read_text())) < 3000


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='Linux has this file')
def test_a_full_disk_is_one_line(run_folder, photos, tmp_path, capsys, monkeypatch):
    command = [sys.executable, '-m', 'smpconv_models.predict', photos / 'a.png', '--checkpoint', run_folder]
    with open('/dev/full', 'w') as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    message = 'python -m smpconv_models.predict: error: standard output cannot be written: No space left on device\n'
    assert (done.returncode, done.stderr) == (1, message)
    monkeypatch.setattr(np, 'save', lambda *_: Path('/dev/full').write_text('x'))
    path = tmp_path / 'f.npy'
    line = programs.refused(main, capsys, photos / 'a.png', '--checkpoint', run_folder, '--features', path, code=1)
    assert f'error: --features {path} cannot be written: No space left on device' in line
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_ends_the_program(run_folder, photos, tmp_path):
    for index in range(3000):
        (tmp_path / f'{index:04}.webp').symlink_to(photos / 'b.webp')
    command = [sys.executable, '-m', 'smpconv_models.predict', tmp_path, '--checkpoint', run_folder, '-b', '1']
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        start = time.monotonic()
        process.stdout.close()
        assert process.wait(timeout=60) == 0 and process.stderr.read() == ''
    assert time.monotonic() - start < 5  # all images take longer


@pytest.mark.parametrize(('argv', 'message'), [
    (['PHOTOS'], 'the following arguments are required: --checkpoint'),
    (['PHOTOS', '--checkpoint', 'GONE'], 'GONE'),
    (['GONE', '--checkpoint', 'RUN'], 'images: no such file or folder: GONE'),
    (['', '--checkpoint', 'RUN'], 'images: no such file or folder: an empty path'),
    (['EMPTY', '--checkpoint', 'RUN'], 'has the extension of an image'),
    (['-', '-', '--checkpoint', 'RUN'], '- is given twice'),
    (['PHOTOS', '--checkpoint', 'hf-hub:OWNER/NAME', '--num-classes', '7'], 'leave out --num-classes'),
    (['PHOTOS', '--checkpoint', 'RUN', '--heat-map', 'PHOTOS'], 'is not a folder'),
    (['FOLDER', '--checkpoint', 'RUN', '--heat-map', 'FOLDER/heat'], 'is in the folder of images'),
    (['PHOTOS', '--checkpoint', 'RUN', '--output', 'results.txt'], '--output takes the name of a .csv or .json file'),
    (['PHOTOS', '--checkpoint', 'RUN', '--features', 'EMPTY/no/f.npy'], 'cannot be written'),
    (['PHOTOS', '--checkpoint', 'RUN', '--topk', '0'], 'must be at least 1'),
    (['PHOTOS', '--checkpoint', 'RUN', '--device', 'tpu9'], '--device tpu9 cannot be used'),
    (['PHOTOS', '--checkpoint', 'RUN', '--ouput', 'a.csv'], 'did you mean --output?'),
])
def test_errors_are_one_line(run_folder, photos, tmp_path, capsys, argv, message):
    (tmp_path / 'empty').mkdir()
    places = {'PHOTOS': photos / 'a.png', 'RUN': run_folder, 'EMPTY': tmp_path / 'empty', 'FOLDER': photos}
    argv = [str(places.get(item, item)).replace('EMPTY', str(tmp_path / 'empty')) for item in argv]
    argv = [item.replace('FOLDER', str(photos)) for item in argv]
    assert message in programs.refused(main, capsys, *argv)
    assert [path.name for path in tmp_path.iterdir()] == ['empty']
