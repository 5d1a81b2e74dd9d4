"""Data sets in COCO format: validation, reading, results and metrics."""
import json

import pytest
import torch
from PIL import Image
from programs import load
from torchvision.transforms import v2

COCO = pytest.importorskip('pycocotools.coco').COCO
COCOeval = pytest.importorskip('pycocotools.cocoeval').COCOeval
folders = load('examples/coco_folder')


# --- bad data ---


def empty_box(content):
    content['annotations'][1]['bbox'] = [3, 4, 0, 5]


@pytest.mark.parametrize(('change', 'message'), [
    (lambda c: c['images'][1].update(file_name='gone.png'), r'image 12: .*train/gone.png does not exist'),
    (lambda c: c['images'][1].update(width=51),
     r'image 12: .*12.png must have 51x70 pixels, as in the record, got 50x70'),
    (lambda c: c['images'][1].pop('height'), 'image 12 has no height'),
    (lambda c: c['images'][1].update(width='50'), "image 12: width must be of type int, got '50'"),
    (lambda c: c['images'][1].update(id=11), 'ids of images must be unique, got more than once 11'),
    (lambda c: c['annotations'][2].update(id=2), 'ids of annotations must be unique, got more than once 2'),
    (lambda c: c['categories'][1].update(id=7), 'ids of categories must be unique, got more than once 7'),
    (lambda c: c['categories'][1].pop('name'), 'category 3 has no name'),
    (lambda c: c['annotations'][0].pop('id'), r'annotations\[0\] has no id'),
    (lambda c: c['annotations'].append(5), r'annotations\[3\] must be an object, got 5'),
    (lambda c: c['annotations'][0].update(image_id=99), 'annotation 1: image 99 does not exist'),
    (lambda c: c['annotations'][0].update(category_id=8), 'annotation 1: category 8 does not exist, only 3, 7'),
    (lambda c: c['annotations'][0].update(bbox=[1, 2, 3]), r'annotation 1: bbox must be .* got \[1, 2, 3\]'),
    (lambda c: c['annotations'][0].update(bbox=[1, 2, 3, float('nan')]), 'annotation 1: bbox must be .*nan'),
    (lambda c: c['annotations'][0].update(bbox=[1, 2, 3, True]), 'annotation 1: bbox must be .*True'),
    (empty_box, r'annotation 2: bbox must have an area within the 60x40 pixels of image 11, got \[3, 4, 0, 5\]'),
    (lambda c: c['annotations'][1].update(bbox=[3, 4, 5, -1]), 'annotation 2: bbox must have an area'),
    (lambda c: c['annotations'][1].update(bbox=[60, 4, 5, 5]), 'annotation 2: bbox must have an area within'),
    (lambda c: c.pop('categories'), 'categories is missing or not a list'),
    (lambda c: c.update(images=[]), 'must have images and categories, got 0 and 2'),
])
def test_a_wrong_record_is_named(written, change, message):
    folder = written(change=change)
    with pytest.raises(ValueError, match=message) as error:
        folders.CocoFolder(folder, 'train')
    assert 'instances_train.json' in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('size', [(1, 1), (1, 300)])
def test_images_of_one_pixel_are_named(written, size):
    folder = written(change=lambda c: c['images'][2].update(width=size[0], height=size[1]))
    Image.new('RGB', size).save(folder / 'train' / '13.png')
    with pytest.raises(ValueError, match=f'image 13: .*13.png must have at least 2x2 pixels, got {size[0]}x{size[1]}'):
        folders.CocoFolder(folder, 'train')


def test_a_damaged_image_is_named(written):
    folder = written()
    (folder / 'train' / '12.png').write_bytes(b'<html>')
    with pytest.raises(ValueError, match=r'image 12: .*12.png cannot be read as an image'):
        folders.CocoFolder(folder, 'train')


@pytest.mark.parametrize('text', ['{"images": [', '', '[]', '3', '\xff\xfe'])
def test_other_files_are_refused(written, text):
    folder = written()
    path = folder / 'annotations' / 'instances_train.json'
    path.write_bytes(text.encode('latin-1'))
    with pytest.raises(ValueError, match=r"is not JSON|must have COCO's lists") as error:
        folders.CocoFolder(folder, 'train')
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r'cannot be read: .*annotations/instances_train.json'):
        folders.CocoFolder(tmp_path, 'train')


# --- what is read ---


def test_images_and_targets(written):
    data = folders.CocoFolder(written(), 'train')
    assert data.categories == {3: 'emu', 7: 'gnu'} and len(data) == 3
    image, target = data[0]
    assert image.shape == (3, 40, 60) and image.dtype == torch.float32
    assert torch.equal(image[0], torch.full((40, 60), 11 / 255))
    assert target['image_id'] == 11
    assert target['boxes'].tolist() == [[5, 6, 25, 16], [30, 10, 42.5, 35]]
    assert target['labels'].tolist() == [2, 1]  # of categories 7 and 3
    assert data[1][1]['boxes'].tolist() == [[0, 0, 18, 70]]  # clamped
    assert data[2][1]['boxes'].shape == (0, 4) and data[2][1]['labels'].dtype == torch.long


def test_crowds_are_no_targets(written):
    data = folders.CocoFolder(written(change=lambda c: c['annotations'][0].update(iscrowd=1)), 'train')
    assert data[0][1]['labels'].tolist() == [1] and data[0][1]['boxes'].tolist() == [[30, 10, 42.5, 35]]


def test_mirrored_images_have_mirrored_boxes(written):
    data = folders.CocoFolder(
        written(), 'train', augment=v2.Compose([v2.ToImage(), v2.RandomHorizontalFlip(1.)]))
    assert data[0][1]['boxes'].tolist() == [[35, 6, 55, 16], [17.5, 10, 30, 35]]


@pytest.mark.parametrize('change', [
    lambda content: None,
    lambda content: [record.update(id=index) for index, record in enumerate(content['annotations'])],  # from 0
    lambda content: [(record.pop('iscrowd'), record.pop('area')) for record in content['annotations']],
])
def test_the_truth_itself_is_perfect(written, capsys, change):
    """Also with ids from 0, and without what other programs leave out."""
    data = folders.CocoFolder(written(change=change), 'train')
    results = []
    for _, target in data:
        results += data.results(target['image_id'], {**target, 'scores': torch.ones(len(target['labels']))})
    results[2]['bbox'] = [-2, 0, 20, 80]  # the annotation goes beyond the image
    assert data.metrics(results)['AP'] == pytest.approx(1)
    nothing = data.metrics([])
    assert nothing['AP'] == 0 and nothing['AP large'] == -1  # there are none
    assert capsys.readouterr().out == ''


def test_empty_boxes_are_left_out_if_asked(written):
    data = folders.CocoFolder(written(change=empty_box), 'train', skip_empty_boxes=True)
    assert data.skipped == 1
    assert data[0][1]['labels'].tolist() == [2]
    assert sorted(data.coco.anns) == [1, 2]  # nor are they missed in evaluation


# --- evaluation ---


def detections(boxes, labels, scores):
    return {'boxes': torch.tensor(boxes), 'labels': torch.tensor(labels), 'scores': torch.tensor(scores)}


def test_figures_are_those_of_pycocotools(written, tmp_path):
    folder = written()
    data = folders.CocoFolder(folder, 'train')
    found = {11: detections([[5., 6, 24, 17], [31., 12, 40, 35], [0., 0, 9, 9]], [2, 1, 1], [0.9, 0.6, 0.7]),
             12: detections([[0., 0, 18, 60]], [2], [0.8])}
    results = [result for image, detected in found.items() for result in data.results(image, detected)]
    assert results[0] == {'image_id': 11, 'category_id': 7, 'bbox': [5, 6, 19, 11], 'score': pytest.approx(0.9)}
    (tmp_path / 'results.json').write_text(json.dumps(results))
    truth = COCO(str(folder / 'annotations' / 'instances_train.json'))
    evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / 'results.json')), 'bbox')
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    figures = data.metrics(results)
    assert list(figures.values()) == evaluation.stats.tolist()
    assert 0 < figures['AP'] < figures['AP50'] < 1
