"""The data sets by name, and what all have in common."""
import ast
import pickle
from pathlib import Path

import made_sequences as made
import pytest
import torch
from torch.utils.data import DataLoader

from smpconv_models import data
from smpconv_models.data import DATASET_NAMES, SequenceDataset, create_sequence_dataset
from smpconv_models.data.registry import InMemorySequences

SHAPES = {
    'digits': (1, 64), 'permuted-digits': (1, 64), 'mnist': (1, 784), 'permuted-mnist': (1, 784), 'cifar10': (3, 1024),
    'characters': (3, 182), 'speech-mfcc': (20, 161), 'speech': (1, 16000)}
SPLITS = {name: ('train', 'test') if 'mnist' in name or name == 'cifar10' else ('train', 'validation', 'test')
          for name in DATASET_NAMES}
SPLITS.update(dict.fromkeys(('digits', 'permuted-digits'), ('train', 'validation')))


@pytest.fixture(scope='module')
def root(tmp_path_factory, server):
    """All data sets in a folder."""
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


@pytest.mark.parametrize('split, same', [
    ('training', 'train'), ('val', 'validation'), ('eval', 'validation'), ('testing', 'test')])
def test_splits_go_by_timms_names(root, split, same):
    found, expected = (create_sequence_dataset('characters', root, name) for name in (split, same))
    assert found.labels == expected.labels and torch.equal(found[0][0], expected[0][0])


def test_validation_means_the_test_images_where_there_are_two_parts(root):
    for name in ('mnist', 'cifar10'):
        found, expected = (create_sequence_dataset(name, root, split) for split in ('validation', 'test'))
        assert found.labels == expected.labels and torch.equal(found[5][0], expected[5][0])


# --- what is refused ---


@pytest.mark.parametrize('name, root, split, told', [
    ('mnits', '.', 'train', r"one of \('characters', .*got 'mnits'; did you mean mnist\?$"),
    ('', '.', 'train', r"one of \('characters', .*got ''$"),
    ('digits', None, 'test', r"split of digits must be one of \('train', .*got 'test'$"),
    ('mnist', '.', 'tset', r"split of mnist must be one of \('train', .*got 'tset'$"),
    ('speech', '.', '', r"split of speech must be one of .*got ''$"),
    ('mnist', None, 'train', 'mnist needs a folder for its files: root is None$'),
    ('mnist', '', 'train', "mnist needs a folder .*: root is ''$"),
    ('mnist', __file__, 'train', 'mnist needs a folder .*: root is the file .*test_registry.py$'),
])
def test_mistakes_are_told(name, root, split, told):
    with pytest.raises(ValueError, match=told):
        create_sequence_dataset(name, root, split)


@pytest.mark.parametrize('name, told', [
    ('mnist', 'train-images-idx3-ubyte is missing: pass download=True, or put https?://.*gz, unpacked, there by hand$'),
    ('cifar10', r'data_batch_1 is missing or damaged \(7 such files\): pass download=True, or unpack \S+://.*hand$'),
    ('characters', r'trajectories.zip is missing: pass download=True, or put \S+://.* there by hand$'),
    ('speech', r'v0.02.tar.gz is missing: pass download=True, or put https://storage.* there by hand$'),
    ('speech-mfcc', r'v0.02.tar.gz is missing: pass download=True'),
])
def test_missing_files_are_told(tmp_path, name, told):
    """And nothing is made where nothing was asked for."""
    with pytest.raises(ValueError, match=told):
        create_sequence_dataset(name, tmp_path / 'none', 'train')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('name', ['mnist', 'cifar10', 'characters', 'speech'])
def test_a_folder_that_cannot_be_made_is_told(tmp_path, name):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match=r'file/data cannot be written: Not a directory$'):
        create_sequence_dataset(name, tmp_path / 'file' / 'data', 'train', download=True)


def test_a_missing_class_is_told():
    with pytest.raises(ValueError, match=r"^it has no sequence of 1 of 3 classes: \['b'\]$"):
        InMemorySequences('it', 'abc', torch.zeros(3, 1, 5), [0, 2, 2], 0, 1)


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_numbers_that_are_not_finite_are_told(bad):
    data = torch.zeros(3, 2, 5)
    data[1, 1, 4] = bad
    with pytest.raises(ValueError, match=r'^it has NaN or inf in 1 of 3 sequences, such as \[1\]$'):
        InMemorySequences('it', 'ab', data, [0, 1, 1], 0, 1)


def test_public_names_are_frozen():
    assert data.__all__ == ['DATASET_NAMES', 'EMBEDDED_NAMES', 'SequenceDataset', 'create_sequence_dataset']
    assert tuple(sorted(SHAPES)) == DATASET_NAMES


def test_heavy_libraries_are_imported_where_they_are_used():
    heavy = {'scipy', 'sklearn', 'torchvision'}
    for path in Path(data.__file__).parent.glob('*.py'):
        for node in ast.parse(path.read_text()).body:
            names = [node.module or ''] if isinstance(node, ast.ImportFrom) else [
                alias.name for alias in getattr(node, 'names', [])]
            assert not heavy & {name.partition('.')[0] for name in names}, path
