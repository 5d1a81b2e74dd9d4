"""Small data sets of sequences, in the forms in which they are published."""
import functools
import gzip
import hashlib
import io
import pickle
import struct
import tarfile
import tempfile
import wave
import zipfile
from pathlib import Path

import numpy as np
import scipy.io

from smpconv_models.data import characters, speech

LETTERS = 'abcdeghlmnopqrsuvwyz'
EACH = {'train': 3, 'validation': 1, 'test': 1}  # clips of a word


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def below(folder):
    """Return the paths of everything in a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*'))


# --- MNIST and CIFAR10 ---


def mnist_files(counts=(('train', 40), ('t10k', 20))):
    """Return the four unpacked files: name -> bytes."""
    files = {}
    for part, count in counts:
        labels = np.arange(count, dtype='uint8') % 10
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), 'uint8')
        files[f'{part}-images-idx3-ubyte'] = struct.pack('>4I', 0x803, count, 28, 28) + pixels.tobytes()
        files[f'{part}-labels-idx1-ubyte'] = struct.pack('>2I', 0x801, count) + labels.tobytes()
    return files


def make_mnist(root):
    folder = root / 'MNIST' / 'raw'
    folder.mkdir(parents=True)
    for name, content in mnist_files().items():
        (folder / name).write_bytes(content)
    return root


def published(server):
    """Return a new folder of the server, and its address."""
    folder = Path(tempfile.mkdtemp(dir=server[0]))
    return folder, f'{server[1]}/{folder.name}'


def publish_mnist(server, patch):
    """Return the folder of a mirror from which torchvision downloads the packed files."""
    from torchvision.datasets import MNIST
    folder, address = published(server)
    resources = []
    for name, content in mnist_files().items():
        packed = gzip.compress(content)
        (folder / f'{name}.gz').write_bytes(packed)
        resources.append((f'{name}.gz', hashlib.md5(packed).hexdigest()))
    patch.setattr(MNIST, 'mirrors', [f'{address}/'])
    patch.setattr(MNIST, 'resources', resources)
    return folder


def publish_cifar10(server, patch):
    """Return the folder of the archive for torchvision. Pixels of image i are i + 2 row + column + 16 channel."""
    from torchvision.datasets import CIFAR10
    folder, address = published(server)
    names = [f'data_batch_{number}' for number in range(1, 6)] + ['test_batch']
    place = np.add.outer(2 * np.arange(32), np.arange(32)) + 16 * np.arange(3)[:, None, None]
    files = {}
    for name in names:
        data = (place.reshape(1, 3072) + np.arange(10)[:, None]).astype('uint8')
        files[name] = pickle.dumps({'data': data, 'labels': list(range(10)), 'batch_label': name})
    files['batches.meta'] = pickle.dumps({'label_names': [f'class {label}' for label in range(10)]})
    path = folder / CIFAR10.filename
    with tarfile.open(path, 'w:gz') as archive:
        for name, content in files.items():
            add(archive, f'{CIFAR10.base_folder}/{name}', content)
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    patch.setattr(CIFAR10, 'url', f'{address}/{path.name}')
    patch.setattr(CIFAR10, 'tgz_md5', hashlib.md5(path.read_bytes()).hexdigest())
    patch.setattr(CIFAR10, 'train_list', [[name, sums[name]] for name in names[:5]])
    patch.setattr(CIFAR10, 'test_list', [['test_batch', sums['test_batch']]])
    patch.setattr(CIFAR10, 'meta', {**CIFAR10.meta, 'md5': sums['batches.meta']})
    return folder


def add(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


# --- characters ---


def letters(each=12):
    """Return letters padded with zeros, as in the published file, and their labels from 1."""
    generator = np.random.default_rng(0)
    found, labels = [], []
    for label in range(1, len(LETTERS) + 1):
        for _ in range(each):
            before, steps, after = generator.integers((0, 60, 0), (10, 183, 13))
            moved = generator.normal((label, -label, 100), (1, 2, 50), (steps, 3)).T
            found.append(np.pad(moved, ((0, 0), (before, after))))
            labels.append(label)
    return found, labels


def mat(found, labels, key=LETTERS):
    """Return the content of a MATLAB 5 file."""
    cell = np.empty((1, len(found)), object)
    for index, letter in enumerate(found):
        cell[0, index] = letter
    names = np.empty((1, len(key)), object)
    for index, name in enumerate(key):
        names[0, index] = name
    consts = {'datanorm': np.ones((1, 3)), 'dt': 0.005, 'key': names, 'charlabels': np.array([labels], 'uint8')}
    file = io.BytesIO()
    scipy.io.savemat(file, {'mixout': cell, 'consts': consts})
    return file.getvalue()


def publish_characters(path, patch, content=None, member='mixoutALL_shifted.mat'):
    """Write the archive and make it the published file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('trajectories.names', 'Character Trajectories')
        archive.writestr(member, mat(*letters()) if content is None else content)
    patch.setattr(characters, 'URL', path.as_uri())
    patch.setattr(characters, 'SHA256', sha256(path))
    return path


# --- speech ---


def sound(index, samples=16000, channels=1, width=2, rate=16000):
    """Return the bytes of a WAV file."""
    generator = np.random.default_rng(index)
    time = np.arange(samples) / 16000
    values = 8000 * np.sin(2 * np.pi * (200 + 50 * index) * time) + generator.normal(0, 300, samples)
    file = io.BytesIO()
    with wave.open(file, 'wb') as out:
        out.setparams((channels, width, rate, 0, 'NONE', ''))
        out.writeframes(np.repeat(values.astype('<i2'), channels).tobytes()[:samples * channels * width])
    return file.getvalue()


@functools.lru_cache(maxsize=1)
def clips():
    """Return all files of the folder: name -> bytes. The third training clip of a word is shorter than a second."""
    files, lists = {}, {part: [] for part in EACH}
    for number, word in enumerate((*speech.WORDS, 'bed')):
        for index, part in enumerate(part for part, count in EACH.items() for _ in range(count)):
            name = f'{word}/{number:04x}{index}_nohash_0.wav'
            files[name] = sound(10 * number + index, 12000 if index == 2 else 16000)
            lists[part].append(name)
    files['_background_noise_/noise.wav'] = sound(999, 40000)
    files['validation_list.txt'] = '\n'.join(lists['validation'] + ['']).encode()
    files['testing_list.txt'] = '\n'.join(lists['test'] + ['']).encode()
    files['LICENSE'] = b'CC BY'
    return files


def make_speech(root):
    folder = root / 'SpeechCommands' / 'speech_commands_v0.02'
    for name, content in clips().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def publish_speech(path, patch, extra=()):
    """Write an archive whose members begin with ./, and `extra` members, and make it the published file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w:gz', compresslevel=0) as archive:
        for name, content in clips().items():
            add(archive, f'./{name}', content)
        for member in extra:
            archive.addfile(member)
    patch.setattr(speech, 'URL', path.as_uri())
    patch.setattr(speech, 'SHA256', sha256(path))
    return path
