"""Examples of features and segmentation."""
import runpy

import pytest
import torch
from programs import ROOT, load, refused
from safetensors.torch import load_file

pytest.importorskip('segmentation_models_pytorch')
EXAMPLES = ROOT / 'examples'
segmentation = load('examples/segmentation')


def test_features_prints_what_its_comments_say(capsys):
    runpy.run_path(str(EXAMPLES / 'features.py'))
    lines = capsys.readouterr().out.splitlines()
    comments = [
        line.partition('  # ')[2] for line in (EXAMPLES / 'features.py').read_text().splitlines() if 'print(' in line]
    assert lines[0] == comments[0] and ', '.join(lines[1:]) == comments[1]


def test_masks_cover_the_digits():
    images, masks = segmentation.make_images('validation', 40, 64, seed=3).tensors
    assert images.shape == (40, 3, 64, 64) and masks.shape == (40, 1, 64, 64)
    assert images.min() >= 0 and images.max() <= 1 and set(masks.unique().tolist()) == {0., 1.}
    assert 0.03 < masks.mean() < 0.5
    for image, mask in zip(images.mean(1), masks[:, 0].bool()):
        if mask.sum() > 20:
            assert (image[mask].mean() - image[~mask].mean()).abs() > 0.1
    again = segmentation.make_images('validation', 40, 64, seed=3).tensors
    assert torch.equal(images, again[0]) and torch.equal(masks, again[1])
    assert not torch.equal(images, segmentation.make_images('validation', 40, 64, seed=4).tensors[0])


def test_the_intersection_over_the_union():
    masks = torch.zeros(2, 1, 4, 4)
    masks[:, :, :2] = 1
    predicted = torch.zeros(2, 1, 4, 4)
    predicted[:, :, :, :2] = 1  # 8 pixels of both, 24 of either
    assert segmentation.iou(predicted, masks) == pytest.approx(1 / 3)


def test_a_run_trains_writes_its_files_and_keeps_radii_in_range(tmp_path, monkeypatch, capsys):
    out, splits, made = tmp_path / 'out', [], segmentation.make_images
    monkeypatch.setattr(segmentation, 'make_images', lambda split, *args: splits.append(split) or made(split, *args))
    torch.manual_seed(0)
    before = segmentation.create_model('smpconv_nano').state_dict()
    assert segmentation.main([
        '--output', str(out), '--images', '16', '--batch-size', '8', '--epochs', '1', '--size', '32', '--lr', '30',
        '--seed', '0']) == 0
    assert sorted(path.name for path in out.iterdir()) == ['segmentation.png', 'unet.safetensors']
    heading, row, last = capsys.readouterr().out.splitlines()
    assert heading.split() == ['epoch', 'loss', 'IoU'] and row.split()[2] in last and str(out) in last
    after = load_file(out / 'unet.safetensors')
    segmentation.create_model('smpconv_nano').load_state_dict(after)
    assert splits == ['train', 'validation']
    assert not any(torch.equal(after[name], before[name]) for name in before if name.endswith('.coords'))
    radii = torch.cat([value for name, value in after.items() if name.endswith('.radius')])
    assert radii.min().item() == pytest.approx(1e-3) and radii.max() == 1  # without clipping they would leave the range


@pytest.mark.slow  # trains for a minute and a half
def test_segmentation_learns(tmp_path):
    args = segmentation.create_parser().parse_args(['--output', str(tmp_path / 'out')])
    assert segmentation.run(args) > 0.85


def test_invalid_arguments_are_one_line(tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    for arguments, message in (
            (('--encoder', 'resnet18'), "got 'resnet18'"), (('--size', '50'), 'a multiple of 32, got 50'),
            (('--epochs', '0'), '--epochs 0'), (('--images', '4'), '--images 4'), (('--lr', '-1'), 'got -1.0'),
            (('--output', tmp_path / 'file'), str(tmp_path / 'file'))):
        line = refused(segmentation.main, capsys, '--output', tmp_path / 'out', *arguments)
        assert line.startswith('segmentation.py: error: ') and message in line
    assert [path.name for path in tmp_path.iterdir()] == ['file']
