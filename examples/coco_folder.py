"""Detection data in COCO format: validated first, read by torchvision, evaluated by pycocotools.

    FOLDER/SPLIT/IMAGES    FOLDER/annotations/instances_SPLIT.json
"""
import contextlib
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2
from tqdm import tqdm

METRICS = (
    'AP', 'AP50', 'AP75', 'AP small', 'AP medium', 'AP large',
    'AR 1', 'AR 10', 'AR 100', 'AR small', 'AR medium', 'AR large')

Record = Dict[str, Any]
Detections = Dict[str, torch.Tensor]


class CocoFolder(Dataset):
    """Split of a data set: images in [0, 1] and targets for torchvision's detectors.

    Labels count from 1 in the order of the categories' ids. Crowd annotations are not targets.

    Args:
        folder: Folder of the data set.
        split: Name of the split, e.g. train2017.
        skip_empty_boxes: Whether to skip annotations whose box has no area within the image, instead of refusing them.
        augment: Transform (v2) of image and target, applied at each read.

    Attributes:
        coco: pycocotools' index of the annotations.
        categories: Names by id, ascending.
        skipped: Number of skipped annotations.

    Raises:
        ValueError: If a record is wrong; the message names it.
    """

    def __init__(
            self, folder: Path, split: str, skip_empty_boxes: bool = False,
            augment: Optional[Callable[..., Any]] = None) -> None:
        path = annotation_file(folder, split)
        content = check(path, folder / split, skip_empty_boxes)
        with quiet():
            data = CocoDetection(folder / split, str(path))
            self.skipped = len(data.coco.anns) - len(content['annotations'])
            data.coco.dataset = content
            data.coco.createIndex()
        self.coco = data.coco
        self.ids = data.ids
        self.categories = {record['id']: record['name'] for record in sorted(
            content['categories'], key=lambda record: record['id'])}
        self.augment = augment
        self._labels = {category: index + 1 for index, category in enumerate(self.categories)}
        self._data = wrap_dataset_for_transforms_v2(data, target_keys=('image_id', 'boxes', 'labels', 'iscrowd'))
        self._finish = v2.Compose([
            v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, Dict[str, Any]]:
        try:
            image, target = self._data[index]
        except (OSError, SyntaxError) as error:
            name = self.coco.imgs[self.ids[index]]['file_name']
            raise ValueError(f'image {self.ids[index]}: {name} cannot be read: {error}') from error
        boxes, labels = target.get('boxes', torch.zeros(0, 4)), target.get('labels', torch.zeros(0, dtype=torch.long))
        alone = ~torch.tensor(target.get('iscrowd', []), dtype=torch.bool)
        target = {
            'boxes': tv_tensors.BoundingBoxes(
                boxes[alone], format='XYXY', canvas_size=(image.height, image.width)),
            'labels': torch.tensor([self._labels[category] for category in labels[alone].tolist()], dtype=torch.long),
        }
        if self.augment is not None:
            image, target = self.augment(image, target)
        image, target = self._finish(image, target)
        return image, {'image_id': self.ids[index], **target}

    def results(self, image_id: int, detections: Detections) -> List[Record]:
        """Return an image's detections as records of a COCO results file."""
        corners = detections['boxes'].double().cpu().numpy()
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
        ids = list(self.categories)
        return [
            {'image_id': image_id, 'category_id': ids[label - 1], 'bbox': box, 'score': score}
            for box, label, score in zip(boxes, detections['labels'].tolist(), detections['scores'].tolist())]

    def metrics(self, results: Sequence[Record]) -> Dict[str, float]:
        """Return COCO's twelve metrics of the whole split, by pycocotools; -1 for a metric without objects."""
        from pycocotools.cocoeval import COCOeval
        with quiet():
            evaluation = COCOeval(self.coco, self._index(results), 'bbox')
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return dict(zip(METRICS, evaluation.stats.tolist()))


    def _index(self, results: Sequence[Record]) -> Any:
        from pycocotools.coco import COCO
        if results:
            return self.coco.loadRes(list(results))
        empty = COCO()  # loadRes takes no empty list
        empty.dataset = {**self.coco.dataset, 'annotations': []}
        empty.createIndex()
        return empty


def annotation_file(folder: Path, split: str) -> Path:
    """Return the path of a split's annotations."""
    return folder / 'annotations' / f'instances_{split}.json'


@contextlib.contextmanager
def quiet() -> Any:
    """Suppress the output of pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def check(path: Path, images: Path, skip_empty_boxes: bool = False) -> Record:
    """Validate an annotation file and the headers of its images.

    Args:
        path: Path of the annotation file.
        images: Folder of the images.
        skip_empty_boxes: Whether to skip annotations with an empty box instead of refusing them.

    Returns:
        Content of the file, with annotations numbered from 1 that all have an area and iscrowd.

    Raises:
        ValueError: If a record is wrong; the message names the first one.
    """
    content = _read(path)
    found = {name: _by_id(path, name, content[name]) for name in ('images', 'annotations', 'categories')}
    if not found['images'] or not found['categories']:
        raise ValueError(f'{path} must have images and categories, got {len(found["images"])} and '
                         f'{len(found["categories"])}')
    for category, record in found['categories'].items():
        _need(record, f'{path}: category {category}', name=str)
    for number, record in tqdm(found['images'].items(), desc=f'checking {images.name}', leave=False, disable=None):
        _check_image(record, f'{path}: image {number}', images)
    kept: List[Record] = []
    for annotation, record in found['annotations'].items():
        if _has_area(record, f'{path}: annotation {annotation}', found['images'], found['categories']):
            # pycocotools reads id 0 as no match, and needs fields that other programs omit
            _, _, width, height = record['bbox']
            kept.append({'iscrowd': 0, 'area': width * height, **record, 'id': len(kept) + 1})
        elif not skip_empty_boxes:
            image = found['images'][record['image_id']]
            raise ValueError(
                f'{path}: annotation {annotation}: bbox must have an area within the {image["width"]}x'
                f'{image["height"]} pixels of image {image["id"]}, got {record["bbox"]}; --skip-empty-boxes '
                'skips such annotations')
    return {**content, 'annotations': kept}


def _read(path: Path) -> Record:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f'annotations cannot be read: {error}') from error
    except (RecursionError, ValueError) as error:  # errors of JSON and of its encoding
        raise ValueError(f'{path} is not JSON: {error}') from error
    for name in ('images', 'annotations', 'categories'):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise ValueError(f'{path} must have COCO\'s lists images, annotations and categories; '
                             f'{name} is missing or not a list')
    return content


def _by_id(path: Path, name: str, records: List[Any]) -> Dict[int, Record]:
    for position, record in enumerate(records):
        _need(record, f'{path}: {name}[{position}]', id=int)
    repeated = [str(number) for number, times in Counter(record['id'] for record in records).items() if times > 1]
    if repeated:
        raise ValueError(f'{path}: ids of {name} must be unique, got more than once {", ".join(repeated[:5])}')
    return {record['id']: record for record in records}


def _need(record: Any, where: str, **types: Any) -> None:
    if not isinstance(record, dict):
        raise ValueError(f'{where} must be an object, got {record!r:.80}')
    for key, kind in types.items():
        if key not in record:
            raise ValueError(f'{where} has no {key}')
        if not isinstance(record[key], kind) or isinstance(record[key], bool):
            raise ValueError(f'{where}: {key} must be of type {kind.__name__}, got {record[key]!r:.80}')


def _check_image(record: Record, where: str, images: Path) -> None:
    _need(record, where, file_name=str, width=int, height=int)
    file = images / record['file_name']
    expected = record['width'], record['height']
    try:
        with Image.open(file) as image:
            size = image.size
    except FileNotFoundError:
        raise ValueError(f'{where}: {file} does not exist') from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f'{where}: {file} cannot be read as an image: {error}') from error
    if size != expected:
        raise ValueError(
            f'{where}: {file} must have {expected[0]}x{expected[1]} pixels, as in the record, got {size[0]}x{size[1]}')
    if min(size) < 2:
        raise ValueError(f'{where}: {file} must have at least 2x2 pixels, got {size[0]}x{size[1]}')


def _has_area(record: Record, where: str, images: Dict[int, Record], categories: Dict[int, Record]) -> bool:
    """Return whether the box has an area within the image."""
    _need(record, where, image_id=int, category_id=int, bbox=list)
    if record['image_id'] not in images:
        raise ValueError(f'{where}: image {record["image_id"]} does not exist')
    if record['category_id'] not in categories:
        raise ValueError(f'{where}: category {record["category_id"]} does not exist, only '
                         f'{", ".join(map(str, sorted(categories)[:10]))}{", ..." if len(categories) > 10 else ""}')
    box = record['bbox']
    if len(box) != 4 or not all(map(_is_number, box)):
        raise ValueError(f'{where}: bbox must be [x, y, width, height] of finite numbers, got {box!r:.80}')
    if record.get('iscrowd', 0) not in (0, 1) or not _is_number(record.get('area', 0)):
        raise ValueError(
            f'{where}: iscrowd must be 0 or 1 and area a number, got {record.get("iscrowd")!r:.40} and '
            f'{record.get("area")!r:.40}')
    left, top, width, height = box
    image = images[record['image_id']]
    inside_x = min(left + width, image['width']) - max(left, 0)
    inside_y = min(top + height, image['height']) - max(top, 0)
    return inside_x > 0 and inside_y > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e9 < value < 1e9
