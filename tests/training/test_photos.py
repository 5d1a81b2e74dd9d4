"""Follow a new user's commands from photos to a model."""
import json
import re
import shutil
import signal
import subprocess
import sys

import pytest
from launch import finish, start, wait_for_step
from PIL import Image
from programs import ROOT
from sklearn.datasets import load_digits

NAMES = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')


def write_photos(folder, digits, count):
    """Write scikit-learn's handwritten digits as photos, a folder for each class."""
    images, labels = load_digits(return_X_y=True)
    for digit in digits:
        (folder / NAMES[digit]).mkdir(parents=True)
        for index in (labels == digit).nonzero()[0][:count].tolist():
            image = Image.fromarray((images[index].reshape(8, 8) * 255 / 16).astype('uint8'))
            image.resize((32, 32)).save(folder / NAMES[digit] / f'{index}.png')
    return folder


def command(*argv):
    """Run a command of docs/photos.md; return its output."""
    done = subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow  # two minutes of training
@pytest.mark.timeout(900)
def test_from_photos_to_a_model(tmp_path, heard_signals):
    first, photos = (write_photos(tmp_path / name, digits, 60) for name, digits in (
        ('first', range(5)), ('photos', range(5, 10))))
    recipe = ['--config', ROOT / 'recipes' / 'finetune.yaml', '--model', 'smpconv_nano', '--in-chans', 1, '-j', 0]
    command('train.py', first, *recipe, '--output', tmp_path, '--experiment', 'first', '--epochs', 8, '--lr', 4e-3,
            '--layer-decay', 1)
    tune = [photos, *recipe, '--output', tmp_path, '--initial-checkpoint', tmp_path / 'first' / 'model_best.pth.tar',
            '--epochs', 8, '--lr', 4e-3, '--log-interval', 1]
    process, = start(tune)
    assert 'without their classifier' in wait_for_step(process, 1, 3)
    process.send_signal(signal.SIGINT)
    (code, _, error), = finish([process])
    assert code == 130 and 'the same command resumes the run' in error
    ends = finish(start([*tune, '-b', 8], ranks=2), timeout=600)
    assert [code for code, _, _ in ends] == [0, 0], ends
    printed = ends[0][1]
    assert 'resuming from' in printed and '(8 x 2 ranks)' in printed
    top1 = float(re.search(r'best checkpoint: .* \(top-1 ([\d.]+) %', printed)[1])
    assert top1 >= 90

    best = shutil.move(tmp_path / 'finetune' / 'model_best.pth.tar', tmp_path / 'elsewhere.pth.tar')
    moved = shutil.move(photos, tmp_path / 'moved')
    evaluated = json.loads(command('validate.py', moved, '--checkpoint', best, '-j', 0).splitlines()[-1])
    assert evaluated['top1'] == pytest.approx(top1, abs=0.01) and evaluated['images'] == 60 and evaluated['f1'] > 85
    command('-m', 'smpconv_models.figures', 'kernels', '--checkpoint', best, '--output', tmp_path / 'kernels.png')
    command('hub/convert.py', best, tmp_path / 'folder')
    folder = shutil.move(tmp_path / 'folder', tmp_path / 'model')
    code = (
        'import smpconv_models, timm, torch\n'
        f'model = timm.create_model("local-dir:{folder}", pretrained=True).eval()\n'
        'print(tuple(model(torch.zeros(1, 1, 32, 32)).shape))')
    assert command('-c', code) == '(1, 5)\n'
