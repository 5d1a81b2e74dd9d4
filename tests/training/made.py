"""Small data sets of real image files, in the forms that timm reads."""
import io
import json
import struct
import tarfile

import numpy as np
from PIL import Image

CLASSES = ('ant', 'bee', 'cow')
SPLITS = {'train': 8, 'val': 5}  # images of each class


def jpeg(index, label):
    """A JPEG file's bytes; sizes differ, and the class shows in the colour."""
    generator = np.random.default_rng([index, label])
    height, width = generator.integers(12, 40, 2)
    pixels = generator.integers(0, 120, (height, width, 3)) + np.array([60 * label, 135 - 60 * label, 40])
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype('uint8')).save(file, 'JPEG')
    return file.getvalue()


def samples(split, classes=CLASSES, counts=SPLITS):
    """(class, label, file name, bytes) of a split's images; those of the splits differ."""
    start = 100 * list(counts).index(split)
    return [
        (name, label, f'{label}{index:03d}.jpg', jpeg(start + index, label))
        for label, name in enumerate(classes) for index in range(counts[split])]


def make_folder(root, classes=CLASSES, splits=SPLITS):
    """root/SPLIT/CLASS/IMAGE.jpg"""
    for split in splits:
        for name, _, file, content in samples(split, classes):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            (root / split / name / file).write_bytes(content)
    return root


def write_tar(path, members):
    """A tar file of (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def make_tars(root, classes=CLASSES, splits=SPLITS):
    """root/SPLIT.tar of CLASS/IMAGE.jpg"""
    for split in splits:
        write_tar(root / f'{split}.tar', [(f'{name}/{file}', content) for name, _, file, content in
                                          samples(split, classes)])
    return root


def make_class_tars(root, classes=CLASSES, splits=SPLITS):
    """root/SPLIT/CLASS.tar of IMAGE.jpg"""
    for split in splits:
        for label, name in enumerate(classes):
            write_tar(root / split / f'{name}.tar', [
                (file, content) for _, other, file, content in samples(split, classes) if other == label])
    return root


def make_tar_of_tars(root, classes=CLASSES, splits=SPLITS):
    """root/SPLIT.tar of CLASS.tar of IMAGE.jpg, as ImageNet comes"""
    made = make_class_tars(root / 'made', classes, splits)
    for split in splits:
        write_tar(root / f'{split}.tar', [(f'{name}.tar', (made / split / f'{name}.tar').read_bytes())
                                          for name in classes])
    return root


def make_wds(root, shards=2, classes=CLASSES, splits=SPLITS):
    """root/SPLIT-N.tar of KEY.jpg and KEY.cls, and root/_info.json; a class after the other in turn"""
    info = {}
    for split in splits:
        items = sorted(samples(split, classes), key=lambda sample: sample[2][1:])
        names, lengths = [], []
        for shard in range(shards):
            part = items[shard::shards]
            names.append(f'{split}-{shard:04d}.tar')
            lengths.append(len(part))
            write_tar(root / names[-1], [
                (f'{file[:-4]}.{suffix}', value) for _, label, file, content in part
                for suffix, value in (('jpg', content), ('cls', str(label).encode()))])
        info[split] = dict(name=split, num_samples=len(items), filenames=names, shard_lengths=lengths)
    (root / '_info.json').write_text(json.dumps({'splits': info}))
    return root


def make_parquet(root, shards=2, classes=CLASSES, splits=SPLITS):
    """root/data/SPLIT-N-of-N.parquet, and root/README.md that says how many images there are, as the hub has them"""
    import datasets
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(classes)))
    told = []
    for split in splits:
        items = samples(split, classes)
        name = {'val': 'validation'}.get(split, split)
        (root / 'data').mkdir(parents=True, exist_ok=True)
        for shard in range(shards):
            part = items[shard::shards]
            columns = dict(image=[dict(bytes=content, path=file) for _, _, file, content in part],
                           label=[label for _, label, _, _ in part])
            made = datasets.Dataset.from_dict(columns, features=features)
            made.to_parquet(root / 'data' / f'{name}-{shard:05d}-of-{shards:05d}.parquet')
        told.append(f'  - name: {name}\n    num_examples: {len(items)}\n    num_bytes: 1\n')
    names = ''.join(f"          '{label}': {name}\n" for label, name in enumerate(classes))
    (root / 'README.md').write_text(
        '---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n'
        f'      class_label:\n        names:\n{names}  splits:\n{"".join(told)}---\n')
    return root


def make_mnist(root, counts=(('train', 40), ('t10k', 20))):
    """root/MNIST/raw, digits of noise whose brightness tells the class"""
    folder = root / 'MNIST' / 'raw'
    folder.mkdir(parents=True)
    for split, count in counts:
        generator = np.random.default_rng(count)
        labels = np.arange(count, dtype='uint8') % 10
        pixels = (generator.integers(0, 100, (count, 28, 28)) + 15 * labels[:, None, None]).astype('uint8')
        (folder / f'{split}-images-idx3-ubyte').write_bytes(struct.pack('>4I', 0x803, count, 28, 28) + pixels.tobytes())
        (folder / f'{split}-labels-idx1-ubyte').write_bytes(struct.pack('>2I', 0x801, count) + labels.tobytes())
    return root


# name: (how it is made, --dataset with {} for its folder, name of the validation split)
SOURCES = {
    'folder': (make_folder, '', 'val'),
    'tars': (make_tars, '', 'val'),
    'class_tars': (make_class_tars, '', 'val'),
    'tar_of_tars': (make_tar_of_tars, '', 'val'),
    'torchvision': (make_folder, 'torch/folder', 'val'),
    'hfds_folder': (make_folder, 'hfds/{}', 'validation'),
    'hfds_parquet': (make_parquet, 'hfds/{}', 'validation'),
    'hfids': (make_parquet, 'hfids/{}', 'validation'),
    'wds': (make_wds, 'wds/made', 'val'),
}
