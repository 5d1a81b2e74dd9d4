"""The data sets by name, and properties that all data sets share."""
import ast
import math
import pickle
from pathlib import Path

import made_sequences as made
import pytest
import torch
from torch.utils.data import DataLoader

from smpconv_models import data
from smpconv_models.data import DATASET_NAMES, SequenceDataset, characters, create_sequence_dataset, speech
from smpconv_models.data.registry import InMemorySequences

SHAPES = {
    'digits': (1, 64), 'permuted-digits': (1, 64), 'mnist': (1, 784), 'permuted-mnist': (1, 784), 'cifar10': (3, 1024),
    'characters': (3, 182), 'speech-mfcc': (20, 161), 'speech': (1, 16000)}
SPLITS = {name: ('train', 'test') if 'mnist' in name or name == 'cifar10' else ('train', 'validation', 'test')
          for name in DATASET_NAMES}
SPLITS.update(dict.fromkeys(('digits', 'permuted-digits'), ('train', 'validation')))


@pytest.fixture(scope='module')
def root(tmp_path_factory, server):
    """Return a folder with the files of all data sets."""
    root = tmp_path_factory.mktemp('sequences')
    with pytest.MonkeyPatch.context() as patch:
        made.make_mnist(root)
        made.publish_cifar10(server, patch)
        create_sequence_dataset('cifar10', root, 'train', download=True)
        made.publish_characters(root / 'character+trajectories.zip', patch)
        made.make_speech(root)
        yield root


@pytest.mark.parametrize('name', DATASET_NAMES)
def test_items_are_sequences_of_a_shape_with_their_class(root, name):
    for split in SPLITS[name]:
        dataset = create_sequence_dataset(name, root, split)
        assert isinstance(dataset, SequenceDataset) and dataset.shape == SHAPES[name]
        assert len(dataset) == len(dataset.labels) and set(dataset.labels) == set(range(len(dataset.classes)))
        assert len(dataset.classes) == (20 if name == 'characters' else 10)
        assert dataset.image_size == {64: (8, 8), 784: (28, 28), 1024: (32, 32)}.get(dataset.shape[1])
        for index in (0, len(dataset) - 1):
            sequence, label = dataset[index]
            assert sequence.shape == SHAPES[name] and sequence.dtype == torch.float32 and sequence.isfinite().all()
            assert label == dataset.labels[index] and isinstance(label, int)
            assert dataset.name(index).endswith('.wav') if 'speech' in name else dataset.name(index) == \
                f'sequence {index}'


@pytest.mark.parametrize('name', ['digits', 'permuted-digits', 'characters', 'speech-mfcc', 'speech'])
def test_the_training_split_is_normalised(root, name):
    dataset = create_sequence_dataset(name, root, 'train')
    found = torch.stack([dataset[index][0] for index in range(len(dataset))]).double()
    std, mean = torch.std_mean(found, dim=(0, 2), correction=0)
    # float32's rounding of mean and deviation, some 1e-7 of numbers that are up to 20 deviations off
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, torch.ones_like(std), atol=1e-5, rtol=0)


@pytest.mark.parametrize('name', [name for name in DATASET_NAMES if name != 'cifar10'])  # whose made splits are alike
def test_splits_share_nothing(root, name):
    seen = []
    for split in SPLITS[name]:
        dataset = create_sequence_dataset(name, root, split)
        seen.append({dataset[index][0].numpy().tobytes() for index in range(len(dataset))})
    assert len(set().union(*seen)) == sum(map(len, seen))


@pytest.mark.parametrize('name', ['permuted-mnist', 'cifar10', 'characters', 'speech-mfcc', 'speech'])
def test_data_sets_are_pickled(root, name):
    dataset = create_sequence_dataset(name, root, 'test')
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[3][0], dataset[3][0]) and again.labels == dataset.labels
    assert again.name(3) == dataset.name(3)


def test_workers_of_a_loader_read_them(root):
    dataset = create_sequence_dataset('speech', root, 'train')
    sequences, labels = zip(*DataLoader(dataset, batch_size=10, num_workers=2))
    assert torch.equal(torch.cat(sequences), torch.stack([dataset[index][0] for index in range(30)]))
    assert torch.cat(labels).tolist() == dataset.labels


def test_a_transform_is_applied():
    dataset = create_sequence_dataset('digits', None, 'val')
    plain = dataset[4][0]
    assert dataset.transform is None
    dataset.transform = lambda sequence: -sequence
    assert torch.equal(dataset[4][0], -plain)


@pytest.mark.parametrize('name, split, same', [
    ('characters', 'training', 'train'), ('characters', 'val', 'validation'), ('characters', 'eval', 'validation'),
    ('characters', 'testing', 'test'), ('mnist', 'validation', 'test'), ('cifar10', 'validation', 'test')])
def test_splits_have_the_synonyms_of_timm(root, name, split, same):
    found, expected = (create_sequence_dataset(name, root, each) for each in (split, same))
    assert found.labels == expected.labels and torch.equal(found[5][0], expected[5][0])


# --- downloads ---


def publish(name, folder, server, patch):
    """Publish a data set and return the published files."""
    if name in ('mnist', 'cifar10'):
        return sorted(getattr(made, f'publish_{name}')(server, patch).iterdir())
    return [getattr(made, f'publish_{name.removesuffix("-mfcc")}')(folder / 'published' / 'file', patch)]


@pytest.mark.parametrize('name', ['mnist', 'cifar10', 'characters', 'speech', 'speech-mfcc'])
def test_missing_files_are_downloaded_once(tmp_path, monkeypatch, server, name):
    files, root = publish(name, tmp_path, server, monkeypatch), tmp_path / 'data'
    first = create_sequence_dataset(name, root, 'test', download=True)
    for file in files:
        file.unlink()
    (root / speech.ARCHIVE).unlink(missing_ok=True)  # the unpacked folder is enough
    for download in (False, True):
        assert torch.equal(create_sequence_dataset(name, root, 'test', download)[3][0], first[3][0])
    assert not [path for path in made.below(root) if '.part' in path]


@pytest.mark.parametrize('name', ['mnist', 'cifar10', 'characters', 'speech'])
@pytest.mark.parametrize('change', ['missing', 'html', 'truncated'])
def test_after_a_failed_download_the_next_succeeds(tmp_path, monkeypatch, server, name, change):
    file, *_ = publish(name, tmp_path, server, monkeypatch)
    content, root = file.read_bytes(), tmp_path / 'data'
    file.unlink()
    if change != 'missing':
        file.write_bytes(b'<html>login</html>' if change == 'html' else content[:len(content) // 2])
    message = (rf'^[^\n]*/{file.parent.name}/[^\n]*cannot be downloaded[^\n]* \([^\n]*; (it|the file) can be put at '
               rf'{root}[^\n]* by hand$')
    with pytest.raises(ValueError, match=message):
        create_sequence_dataset(name, root, 'test', download=True)
    with pytest.raises(ValueError, match='pass download=True'):
        create_sequence_dataset(name, root, 'test')
    assert name in ('mnist', 'cifar10') or made.below(root) == []  # torchvision keeps files that are complete
    file.write_bytes(content)
    assert len(create_sequence_dataset(name, root, 'test', download=True)) > 0


@pytest.mark.parametrize('name, module', [('characters', characters), ('speech', speech)])
def test_a_file_of_another_checksum_is_not_parsed(tmp_path, monkeypatch, name, module):
    path = getattr(made, f'publish_{name}')(tmp_path / module.ARCHIVE, monkeypatch)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for parser in ('scipy.io.loadmat', 'tarfile.open'):
        monkeypatch.setattr(parser, lambda *args, **options: pytest.fail('parsed'))
    for download in (False, True):
        with pytest.raises(ValueError, match=r' is damaged, or another file: its SHA-256 is .*remove it and pass'):
            create_sequence_dataset(name, tmp_path, 'train', download)
    assert made.below(tmp_path) == [path.name]


# --- errors ---


@pytest.mark.parametrize('name, root, split, message', [
    ('mnits', '.', 'train', r"one of \('characters', .*got 'mnits'; did you mean mnist\?$"),
    ('', '.', 'train', r"one of \('characters', .*got ''$"),
    ('digits', None, 'test', r"split of digits must be one of \('train', .*got 'test'$"),
    ('mnist', '.', 'tset', r"split of mnist must be one of \('train', .*got 'tset'$"),
    ('speech', '.', '', r"split of speech must be one of .*got ''$"),
    ('mnist', None, 'train', 'mnist needs a folder for its files: root is None$'),
    ('mnist', '', 'train', "mnist needs a folder .*: root is ''$"),
    ('mnist', __file__, 'train', 'mnist needs a folder .*: root is the file .*test_registry.py$'),
])
def test_wrong_arguments_are_reported(name, root, split, message):
    with pytest.raises(ValueError, match=message):
        create_sequence_dataset(name, root, split)


@pytest.mark.parametrize('name, message', [
    ('mnist', 'train-images-idx3-ubyte is missing: pass download=True, or put https?://.*gz, unpacked, there by hand$'),
    ('cifar10', r'data_batch_1 is missing or damaged \(7 such files\): pass download=True, or unpack \S+://.*hand$'),
    ('characters', r'trajectories.zip is missing: pass download=True, or put \S+://.* there by hand$'),
    ('speech', r'v0.02.tar.gz is missing: pass download=True, or put https://storage.* there by hand$'),
    ('speech-mfcc', r'v0.02.tar.gz is missing: pass download=True'),
])
def test_missing_files_are_reported(tmp_path, name, message):
    """Without a download, nothing is written."""
    with pytest.raises(ValueError, match=message):
        create_sequence_dataset(name, tmp_path / 'none', 'train')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('name', ['mnist', 'cifar10', 'characters', 'speech'])
def test_a_folder_that_cannot_be_created_is_reported(tmp_path, name):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match=r'file/data cannot be written: Not a directory$'):
        create_sequence_dataset(name, tmp_path / 'file' / 'data', 'train', download=True)


@pytest.mark.parametrize('value, labels, message', [
    (0, [0, 2, 2], r"has no sequence of 1 of 3 classes: \['b'\]"),
    (math.nan, [0, 1, 2], r'has NaN or inf in 1 of 3 sequences, such as \[1\]'),
    (math.inf, [0, 1, 2], r'has NaN or inf in 1 of 3 sequences, such as \[1\]'),
])
def test_missing_classes_and_values_that_are_not_finite_are_reported(value, labels, message):
    sequences = torch.zeros(3, 2, 5)
    sequences[1, 1, 4] = value
    with pytest.raises(ValueError, match=f'^it {message}$'):
        InMemorySequences('it', 'abc', sequences, labels, 0, 1)


def test_public_names_are_frozen():
    assert data.__all__ == ['DATASET_NAMES', 'EMBEDDED_NAMES', 'SequenceDataset', 'create_sequence_dataset']
    assert tuple(sorted(SHAPES)) == DATASET_NAMES


def test_heavy_libraries_are_imported_on_use():
    heavy = {'scipy', 'sklearn', 'torchvision'}
    for path in Path(data.__file__).parent.glob('*.py'):
        for node in ast.parse(path.read_text()).body:
            names = [node.module or ''] if isinstance(node, ast.ImportFrom) else [
                alias.name for alias in getattr(node, 'names', [])]
            assert not heavy & {name.partition('.')[0] for name in names}, path
