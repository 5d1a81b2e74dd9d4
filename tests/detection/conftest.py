"""Fixtures for tests of detectors and of the example that trains one."""
import json

import pytest
from PIL import Image


@pytest.fixture
def coco(tmp_path):
    """Create a split in COCO format: three images, the last without annotations; return its folder and content."""
    def make(split='train'):
        sizes = {11: (60, 40), 12: (50, 70), 13: (40, 40)}
        (tmp_path / split).mkdir()
        (tmp_path / 'annotations').mkdir(exist_ok=True)
        for number, size in sizes.items():
            Image.new('RGB', size, (number, 0, 0)).save(tmp_path / split / f'{number}.png')
        boxes = [(1, 11, 7, [5, 6, 20, 10]), (2, 11, 3, [30, 10, 12.5, 25]), (3, 12, 7, [-2, 0, 20, 80])]
        content = {
            'images': [{'id': number, 'file_name': f'{number}.png', 'width': width, 'height': height}
                       for number, (width, height) in sizes.items()],
            'annotations': [{'id': number, 'image_id': image, 'category_id': category, 'bbox': box, 'iscrowd': 0,
                             'area': box[2] * box[3]} for number, image, category, box in boxes],
            'categories': [{'id': 7, 'name': 'gnu'}, {'id': 3, 'name': 'emu'}],
        }
        return tmp_path, content
    return make


@pytest.fixture
def written(coco):
    """Fixture coco with the annotations written to their file."""
    def make(split='train', change=lambda content: None):
        folder, content = coco(split)
        change(content)
        (folder / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))
        return folder
    return make
