"""Export: each format computes the same as the model at any size, and errors are one line."""
import json
import sys

import pytest
import timm
import torch
from common import IS_OLD_TIMM
from programs import load, refused
from safetensors.torch import load_file
from torch._inductor import config as inductor_config

from smpconv_models.training import Digits

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')  # PyTorch's, of the exporter that timm's takes

onnxruntime = pytest.importorskip('onnxruntime')
OLD_ONNX = "timm before 1.0.31 passes dynamic_axes to PyTorch's newer exporter"
export = load('examples/export')
OTHER_SIZES = ((1, 3, 32, 32), (4, 3, 48, 32), (2, 3, 33, 57), (7, 3, 20, 25))  # none of which it checks itself but one


@pytest.fixture
def run(tmp_path):
    """Run the program on smpconv_nano; return its exit code and rows."""
    def run_it(*arguments, folder=tmp_path / 'out', model=('--model', 'smpconv_nano')):
        code = export.main([*model, '--output', str(folder), '--rounds', '1', *map(str, arguments)])
        return code, {row['format']: row for row in json.loads((folder / 'export.json').read_text())['formats']}
    return run_it


def onnx(path):
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


READERS = {
    'onnx': onnx, 'onnx-dynamo': onnx, 'torchscript': torch.jit.load,
    'torch-export': lambda path: torch.export.load(path).module(),
    'aotinductor': lambda path: torch._inductor.aoti_load_package(str(path)),
}


@torch.no_grad()
def assert_file_computes_the_same(path, name):
    """Files are loaded without the program; batch, height and width are dynamic."""
    expected = export.load('smpconv_nano', None, None).model
    got = READERS[name](path)
    for size in OTHER_SIZES:
        images = torch.randn(size)
        logits = expected(images)
        torch.testing.assert_close(got(images), logits, rtol=0, atol=1e-4 * logits.abs().max().item())


@pytest.mark.parametrize('name', ['onnx', 'onnx-dynamo', 'torch-export', 'torchscript'])
def test_formats(run, tmp_path, capsys, name):
    if name == 'onnx' and IS_OLD_TIMM:
        pytest.skip(OLD_ONNX)
    code, rows = run('--formats', name)
    assert code == 0 and list(rows) == ['eager', name]
    row = rows[name]
    path = tmp_path / 'out' / row['file']
    assert row['bytes'] == path.stat().st_size and row['difference'] <= 1e-4 and row['milliseconds'] > 0
    assert sorted(file.name for file in path.parent.iterdir()) == sorted([row['file'], 'export.json'])
    assert_file_computes_the_same(path, name)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ['format', 'MB', 'ms', 'difference'] and printed[2].split()[0] == name


@pytest.mark.slow  # the C++ compiler takes half a minute
def test_compiled_formats(run, tmp_path):
    code, rows = run('--formats', 'aotinductor', 'compile')
    assert code == 0 and rows['compile']['difference'] <= 1e-4 and rows['compile']['file'] is None
    assert_file_computes_the_same(tmp_path / 'out' / rows['aotinductor']['file'], 'aotinductor')


@pytest.mark.slow  # float16 takes seconds for an image on CPUs without its arithmetic
def test_smpconv_t(run):
    code, rows = run('--formats', 'onnx', 'onnx-dynamo', 'float16', 'int8', model=('--model', 'smpconv_t'))
    assert code == 0 and all('reason' not in row for row in rows.values())
    assert rows['int8']['bytes'] < 0.3 * rows['eager']['bytes'] and rows['float16']['difference'] < 64 * 2 ** -9


@pytest.mark.skipif(IS_OLD_TIMM, reason=OLD_ONNX)
def test_low_precision(run, tmp_path):
    code, rows = run('--formats', 'float16', 'bfloat16', 'int8', 'int8-dynamic')
    assert code == 0
    for name, share, difference in (
            ('float16', 0.52, 64 * 2 ** -11), ('bfloat16', 0.52, 64 * 2 ** -8), ('int8', 0.45, 1),
            ('int8-dynamic', 0.45, 1)):
        assert rows[name]['bytes'] < share * rows['eager']['bytes']
        # a few dozen roundings in a row, which random weights magnify; what is left is below, with the accuracy
        assert 0 < rows[name]['difference'] < difference
    weights = load_file(tmp_path / 'out' / rows['float16']['file'])
    assert {value.dtype for name, value in weights.items() if not name.endswith('tracked')} == {torch.float16}


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """Checkpoint like those of train.py on the digits; only the classifier is trained, by least squares."""
    path = tmp_path_factory.mktemp('run') / 'model_best.pth.tar'
    arguments = {'num_classes': 10, 'in_chans': 1}
    torch.manual_seed(0)
    model = timm.create_model('smpconv_nano', **arguments)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.
    transform = timm.data.create_transform((1, 32, 32), mean=(0.3,), std=(0.4,), crop_pct=1., interpolation='bicubic')
    digits = Digits('train', transform=transform)
    data = [digits[index] for index in range(len(digits))]
    images, classes = torch.stack([image for image, _ in data]), torch.tensor([digit for _, digit in data])
    with torch.no_grad():
        model.train()(images)
        features = model.eval().forward_head(model.forward_features(images), pre_logits=True)
        targets = torch.nn.functional.one_hot(classes, 10).float() - 0.1
        model.head.fc.weight.copy_(torch.linalg.lstsq(features, targets).solution.T)
    torch.save({
        'arch': 'smpconv_nano', 'state_dict': model.state_dict(), 'model_kwargs': arguments,
        'args': {'dataset': 'digits', 'model': 'smpconv_nano', 'mean': [0.3], 'std': [0.4]}}, path)
    return path


@pytest.mark.slow  # 17 s: a run, three formats
def test_accuracy_on_the_digits(run, checkpoint, capsys):
    code, rows = run('--formats', 'torchscript', 'int8', model=('--checkpoint', str(checkpoint)))
    assert code == 0 and 'top-1' in capsys.readouterr().out.splitlines()[0]
    subject = export.load(None, str(checkpoint), None)
    images, classes = subject.validation
    assert images.shape == (360, 1, 32, 32) and images.mean().abs() < 0.1  # the run's own mean was taken off
    with torch.no_grad():
        right = (subject.model(images).argmax(1) == classes).sum().item()
    assert rows['eager']['top1'] == rows['torchscript']['top1'] == pytest.approx(100 * right / 360)
    assert rows['eager']['top1'] > 25 and rows['int8']['top1'] > rows['eager']['top1'] - 5  # 10 without any knowledge


@pytest.mark.slow  # 12 s: two conversions
def test_int8_of_other_checkpoints_needs_images(run, tmp_path, checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    del content['args']['dataset']
    torch.save(content, tmp_path / 'other.pth.tar')
    model = ('--checkpoint', str(tmp_path / 'other.pth.tar'))
    code, rows = run('--formats', 'int8', model=model)
    assert code == 1 and '--calibration' in rows['int8']['reason']
    (tmp_path / 'images/class').mkdir(parents=True)
    for index, image in enumerate(Digits('train').images[:20]):
        image.save(tmp_path / f'images/class/{index}.png')
    code, rows = run('--formats', 'int8', '--calibration', tmp_path / 'images', model=model)
    assert code == 0 and 'reason' not in rows['int8']
    assert export.load(None, model[1], str(tmp_path / 'images')).calibration.shape == (20, 1, 32, 32)


# --- what goes wrong ---


def test_wrong_outputs_are_a_failure_and_leave_no_file(run, tmp_path, monkeypatch, capsys):
    def wrong(subject, path):
        path.write_text('written')
        return lambda images: subject.model(images) * 1.001

    def raises(subject, path):
        raise RuntimeError('first line\nsecond line')

    monkeypatch.setattr(export, 'FORMATS', {
        'wrong': ('file', wrong), 'raises': (None, raises), 'torchscript': export.FORMATS['torchscript']})
    code, rows = run()
    assert code == 1 and 'differ by 1.0e-03' in rows['wrong']['reason']
    assert rows['raises']['reason'] == 'RuntimeError: first line'
    assert 'reason' not in rows['torchscript']  # the others are made
    assert sorted(file.name for file in (tmp_path / 'out').iterdir()) == ['export.json', 'model_torchscript.pt']
    assert 'first line' in capsys.readouterr().out


@pytest.mark.parametrize('name', ['onnx', 'int8'])
def test_a_missing_library_fails_only_what_was_asked_for(run, monkeypatch, name):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    monkeypatch.setitem(sys.modules, 'onnxruntime.quantization', None)
    reason = "needs onnxruntime: pip install 'smpconv_models[export]'"
    code, rows = run('--formats', name)
    assert code == 1 and rows[name]['reason'] == reason
    monkeypatch.setattr(export, 'FORMATS', {kept: export.FORMATS[kept] for kept in (name, 'torchscript')})
    code, rows = run()
    assert code == 0 and rows[name]['reason'] == reason and 'milliseconds' in rows['torchscript']


@pytest.mark.parametrize('name', ['aotinductor', 'compile'])
def test_a_missing_compiler_is_one_line(run, name):
    with inductor_config.patch({'cpp.cxx': (None, 'no-such-compiler')}):
        code, rows = run('--formats', name)
    assert code == 1 and 'needs a C++ compiler, found no no-such-compiler' in rows[name]['reason']


def test_bad_arguments_are_one_line(tmp_path, capsys):
    (tmp_path / 'file').write_text('<html>')
    (tmp_path / 'empty').mkdir()
    out = ('--output', tmp_path / 'out')
    for arguments, message in (
            ((*out, '--formats', 'onx'), "invalid choice: 'onx'"),
            ((*out, '--model', 'resnet18'), "got 'resnet18'"),
            ((*out, '--checkpoint', tmp_path / 'nothing'), 'found nothing at'),
            ((*out, '--checkpoint', tmp_path / 'file'), str(tmp_path / 'file')),
            ((*out, '--rounds', '0'), '--rounds must be at least 1, got 0'),
            ((*out, '--calibration', tmp_path / 'nothing', '--model', 'smpconv_nano'), 'found none at'),
            ((*out, '--calibration', tmp_path / 'empty', '--model', 'smpconv_nano'), '--calibration'),
            (('--output', tmp_path / 'file', '--model', 'smpconv_nano'), 'is not a folder'),
            (('--output', tmp_path / 'file/within', '--model', 'smpconv_nano'), 'Not a directory'),
            (('--model', 'smpconv_nano'), '--output'),
    ):
        line = refused(export.main, capsys, *arguments)
        assert line.startswith('export.py: error: ') and message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ['empty', 'file']


# --- what a format is held to, by formats that are wrong ---


@pytest.mark.parametrize('name, factor', [
    ('onnx', lambda images: 1 + 1e-3),
    ('onnx', lambda images: 1 if len(images) < 5 else 2),
    ('onnx', lambda images: 1 if images.shape[2] == images.shape[3] else 2),
    ('onnx', lambda images: 1 if images.is_contiguous() else 2),
    ('onnx', float('nan')), ('float16', lambda images: 0), ('float16', float('nan')), ('float16', float('inf')),
    ('int8', float('nan')),
])
def test_a_format_that_computes_something_else_is_none(run, monkeypatch, tmp_path, name, factor):
    def made(subject, path):
        path.write_bytes(b'x')
        return lambda images: subject.model(images) * (factor(images) if callable(factor) else factor)

    (tmp_path / 'out').mkdir()
    monkeypatch.setitem(export.FORMATS, name, ('file', made))
    (tmp_path / 'out/file').write_text('of an earlier model')
    code, rows = run('--formats', name)
    reason = 'its outputs differ' if callable(factor) else f'its outputs differ by {factor}'
    assert code == 1 and reason in rows[name]['reason'] and not (tmp_path / 'out/file').exists()


def test_accuracy_is_the_formats_own():
    images, classes = torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 1, 2])
    subject = export.Subject(None, images, None, (images, classes))
    assert export.measure_accuracy(lambda images: torch.eye(3)[[0, 1, 2, 2]], subject) == 75


def test_each_is_timed_as_often_and_not_always_in_the_same_order():
    calls = []
    runs = {name: lambda image, name=name: calls.append(name) for name in 'abc'}
    assert export.milliseconds(runs, torch.zeros(1), 30).keys() == runs.keys()
    assert sorted(calls) == sorted('abc' * 31) and len({*zip(calls[3::3], calls[4::3])}) > 1


def test_an_unreadable_calibration_image_is_named(tmp_path, capsys):
    (tmp_path / 'images/a').mkdir(parents=True)
    (tmp_path / 'images/a/bad.png').write_text('<html>')
    line = refused(
        export.main, capsys, '--model', 'smpconv_nano', '--formats', 'int8', '--output', tmp_path / 'out',
        '--calibration', tmp_path / 'images')
    assert str(tmp_path / 'images/a/bad.png') in line and 'cannot be read' in line
