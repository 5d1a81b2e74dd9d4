"""Speech Commands: sound files, coefficients, splits, the archive, and damaged folders."""
import io
import math
import os
import shutil
import tarfile
import time
import urllib.response
import wave
from concurrent.futures import ThreadPoolExecutor

import made_sequences as made
import numpy as np
import pytest
import torch

from smpconv_models.data import create_sequence_dataset, speech
from smpconv_models.utils import download

NAMES = ('speech', 'speech-mfcc')


@pytest.fixture
def folder(tmp_path):
    return made.make_speech(tmp_path)


# --- sound files ---


def written(tmp_path, content):
    path = tmp_path / 'clip.wav'
    path.write_bytes(content)
    return path


def test_samples_are_between_minus_one_and_one(tmp_path):
    file = io.BytesIO()
    with wave.open(file, 'wb') as out:
        out.setparams((1, 2, 16000, 0, 'NONE', ''))
        out.writeframes(np.array([-2 ** 15, 2 ** 15 - 1, 0, 256], '<i2').tobytes())
    found = speech.load_wav(written(tmp_path, file.getvalue()))
    assert found.dtype == torch.float32 and found.shape == (16000,)
    assert found[:4].tolist() == [-1, 1 - 2 ** -15, 0, 2 ** -7]
    assert not found[4:].any()  # a shorter clip ends in silence


@pytest.mark.parametrize('content, message', [
    (b'', 'is not a WAV file or is damaged: EOFError'),
    (b'<html>' * 100, 'is not a WAV file or is damaged: file does not start with RIFF id'),
    (made.sound(0)[:20], 'is not a WAV file or is damaged'),
    (made.sound(0)[:9000], 'is damaged: expected 32000 bytes of sound by its header, found 8956'),
    (made.sound(0, channels=2), r'expected \(channels, bits, Hz\) of \(1, 16, 16000\), found \(2, 16, 16000\)'),
    (made.sound(0, width=1), r'found \(1, 8, 16000\)'),
    (made.sound(0, rate=8000), r'found \(1, 16, 8000\)'),
    (made.sound(0, samples=16001), 'expected 1 to 16000 samples, found 16001'),
    (made.sound(0, samples=0), 'expected 1 to 16000 samples, found 0'),
])
def test_damaged_sound_is_reported(tmp_path, content, message):
    with pytest.raises(ValueError, match=f'^[^\n]*clip.wav[^\n]*{message}[^\n]*$'):
        speech.load_wav(written(tmp_path, content))


def test_a_header_of_any_size_takes_no_memory(tmp_path):
    content = bytearray(made.sound(0))
    content[40:44] = (2 ** 32 - 2).to_bytes(4, 'little')  # of the data
    with pytest.raises(ValueError, match='expected 1 to 16000 samples, found 2147483647'):
        speech.load_wav(written(tmp_path, bytes(content)))


# --- cepstral coefficients ---

# Of float32. A coefficient is a sum of 64 logarithms, by factors of at most sqrt(2 / 64). A logarithm is wrong by a
# rounding of its magnitude, at most 14 (the floor's), and by its energy's relative error, some 100 roundings: of a
# transform of 200 samples, squared, in bands beside much stronger ones.
TOLERANCE = 64 * math.sqrt(2 / 64) * (14 + 100) * torch.finfo(torch.float32).eps


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_coefficients_equal_torchaudios(golden, dtype):
    read = golden('mfcc')
    found = speech.mfcc(read['samples'].to(dtype) / 2 ** 15)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), read['coefficients'], atol=TOLERANCE, rtol=0)


def test_a_second_has_161_steps_of_20():
    samples = torch.randn(2, 3, 16000, generator=torch.Generator().manual_seed(0))
    found = speech.mfcc(samples)
    assert found.shape == (2, 3, 20, 161)
    torch.testing.assert_close(found[1, 2], speech.mfcc(samples[1, 2]), atol=TOLERANCE, rtol=0)


def test_silence_is_the_floor_in_the_first_coefficient():
    found = speech.mfcc(torch.zeros(16000, dtype=torch.float64))
    expected = torch.zeros(20, 161, dtype=torch.float64)
    expected[0] = math.log(1e-6) * math.sqrt(64)
    torch.testing.assert_close(found, expected)


# --- splits ---


@pytest.mark.parametrize('name', NAMES)
def test_the_splits_are_the_lists(tmp_path, folder, name):
    files = {}
    for split, each in made.EACH.items():
        dataset = create_sequence_dataset(name, tmp_path, split)
        assert dataset.classes == speech.WORDS and sorted(dataset.labels) == sorted(list(range(10)) * each)
        files[split] = [dataset.name(index) for index in range(len(dataset))]
        assert files[split] == sorted(files[split])
        for file, label in zip(files[split], dataset.labels):
            assert file.startswith(f'{folder}/{speech.WORDS[label]}/')
    for split, list_name in (('validation', 'validation_list.txt'), ('test', 'testing_list.txt')):
        listed = {line for line in (folder / list_name).read_text().split() if not line.startswith('bed/')}
        assert {file[len(str(folder)) + 1:] for file in files[split]} == listed


def test_items_are_the_files_normalised_by_all_training_samples(tmp_path, folder):
    train, test = (create_sequence_dataset('speech', tmp_path, split) for split in ('train', 'test'))
    samples = torch.stack([speech.load_wav(train.name(index)) for index in range(30)]).double()
    std, mean = torch.std_mean(samples, correction=0)
    expected = ((speech.load_wav(test.name(4)).double() - mean) / std).float().unsqueeze(0)
    torch.testing.assert_close(test[4][0], expected, atol=1e-5, rtol=1e-5)


def test_coefficients_are_normalised_each_over_the_training_split(tmp_path, folder):
    train, test = (create_sequence_dataset('speech-mfcc', tmp_path, split) for split in ('train', 'test'))
    found = speech.mfcc(torch.stack([speech.load_wav(train.name(index)) for index in range(30)])).double()
    std, mean = torch.std_mean(found, dim=(0, 2), correction=0)
    expected = ((speech.mfcc(speech.load_wav(test.name(4))) - mean[:, None]) / std[:, None]).float()
    torch.testing.assert_close(test[4][0], expected, atol=1e-4, rtol=1e-4)


# --- the archive ---


def test_one_of_many_processes_downloads(tmp_path, monkeypatch):
    """Threads stand for processes: each has a file handle of its own for the lock."""
    made.publish_speech(tmp_path / 'published.tar.gz', monkeypatch)
    fetched, unpacked = [], []

    def fetch(*args):
        fetched.append(args)
        time.sleep(0.2)
        download.fetch(*args)

    def extract_tar(*args):
        unpacked.append(args)
        download.extract_tar(*args)

    monkeypatch.setattr(speech, 'fetch', fetch)
    monkeypatch.setattr(speech, 'extract_tar', extract_tar)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: create_sequence_dataset('speech', tmp_path / 'data', 'test', True), range(3)))
    assert [len(dataset) for dataset in found] == [10] * 3 and len(fetched) == len(unpacked) == 1


def test_a_download_resumes_and_a_partial_folder_is_removed(tmp_path, monkeypatch):
    path = made.publish_speech(tmp_path / 'published.tar.gz', monkeypatch)
    content = path.read_bytes()
    starts = []

    def open_resumable(url, part):
        start = part.stat().st_size
        starts.append(start)
        return urllib.response.addinfourl(
            io.BytesIO(content[start:]), {'Content-Length': len(content) - start}, url, 206)

    monkeypatch.setattr(download, 'open_resumable', open_resumable)
    root = tmp_path / 'data'
    old = root / 'SpeechCommands' / 'speech_commands_v0.02.partial' / 'yes' / 'old.wav'
    old.parent.mkdir(parents=True)
    old.write_bytes(b'')
    (root / f'{speech.ARCHIVE}.part').write_bytes(content[:1000])
    create_sequence_dataset('speech', root, 'train', download=True)
    assert starts == [1000]
    assert not list(root.rglob('*.part*')) and not list(root.rglob('old.wav'))
    assert (root / speech.ARCHIVE).read_bytes() == content


def test_a_server_that_cannot_resume_sends_the_whole(tmp_path, monkeypatch):
    path = made.publish_speech(tmp_path / 'published.tar.gz', monkeypatch)  # file:// is one
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / f'{speech.ARCHIVE}.part').write_bytes(b'of another try')
    create_sequence_dataset('speech', tmp_path / 'data', 'train', download=True)
    assert (tmp_path / 'data' / speech.ARCHIVE).read_bytes() == path.read_bytes()


@pytest.mark.parametrize('content, headers, status, message, kept', [
    (b'<html>log in', {'Content-Type': 'text/html; charset=utf-8'}, 200,
     'the server sends a page in place of the file', b'first'),
    (b' second', {'Content-Length': 900}, 206, 'the connection ended after 12 of 905 bytes', b'first second'),
])
def test_a_failed_download_keeps_the_bytes_received(tmp_path, monkeypatch, content, headers, status, message, kept):
    made.publish_speech(tmp_path / 'published.tar.gz', monkeypatch)
    monkeypatch.setattr(download, 'open_resumable', lambda url, part: urllib.response.addinfourl(
        io.BytesIO(content), headers, url, status))
    part = tmp_path / 'data' / f'{speech.ARCHIVE}.part'
    part.parent.mkdir()
    part.write_bytes(b'first')
    with pytest.raises(ValueError, match=rf'{message}.; what there is of it is kept in .*gz\.part; the'):
        create_sequence_dataset('speech', tmp_path / 'data', 'train', download=True)
    assert part.read_bytes() == kept and made.below(tmp_path / 'data') == [part.name]


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize('member', [
    tarfile.TarInfo('../outside.wav'), tarfile.TarInfo('./yes/../../../outside.wav'),
    link('yes/link.wav', '../../../x'), link('yes/link.wav', '/etc/passwd'),
    link('yes/link.wav', '../../x', tarfile.LNKTYPE),
    link('yes/pipe.wav', '', tarfile.FIFOTYPE),
], ids=lambda member: f'{member.name}-{member.linkname}')
def test_members_that_leave_the_folder_are_refused(tmp_path, monkeypatch, member):
    made.publish_speech(tmp_path / 'root' / speech.ARCHIVE, monkeypatch, extra=[member])
    with pytest.raises(ValueError, match=r'^[^\n]*gz cannot be unpacked to [^\n]*: \w+Error [^\n]*$'):
        create_sequence_dataset('speech', tmp_path / 'root', 'train')
    assert made.below(tmp_path) == ['root', 'root/SpeechCommands', f'root/{speech.ARCHIVE}']


@pytest.mark.parametrize('change', [lambda content: content[:len(content) // 2], lambda content: b'x' * 5000,
                                    lambda content: b''])
def test_damaged_archives_are_reported(tmp_path, monkeypatch, change):
    path = made.publish_speech(tmp_path / speech.ARCHIVE, monkeypatch)
    path.write_bytes(change(path.read_bytes()))
    monkeypatch.setattr(speech, 'SHA256', made.sha256(path))
    with pytest.raises(ValueError, match=r'^[^\n]*gz cannot be unpacked to [^\n]*v0.02: \w+Error [^\n]*$'):
        create_sequence_dataset('speech', tmp_path, 'train')
    assert made.below(tmp_path) == ['SpeechCommands', speech.ARCHIVE]


@pytest.mark.parametrize('error, expected, message', [
    (OSError(28, 'No space left on device', 'x.wav'), ValueError, r'^[^\n]*cannot be unpacked to [^\n]*No space left'),
    (KeyboardInterrupt(), KeyboardInterrupt, None),
])
def test_an_interrupted_unpacking_leaves_nothing_and_the_next_succeeds(tmp_path, monkeypatch, error, expected, message):
    made.publish_speech(tmp_path / speech.ARCHIVE, monkeypatch)
    extract, calls = tarfile.TarFile.extract, []

    def fail(*args, **options):
        calls.append(args)
        if len(calls) > 5:
            raise error
        extract(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, 'extract', fail)
        with pytest.raises(expected, match=message):
            create_sequence_dataset('speech', tmp_path, 'train')
    assert made.below(tmp_path) == ['SpeechCommands', speech.ARCHIVE]
    assert len(create_sequence_dataset('speech', tmp_path, 'train')) == 30


# --- folders ---


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('change, message', [
    (lambda folder: shutil.rmtree(folder / 'left'), r"WAV files for each of .*found none for \['left'\]"),
    (lambda folder: [path.unlink() for path in (folder / 'up').iterdir()], r"none for \['up'\]; remove .* and pass"),
    (lambda folder: (folder / 'testing_list.txt').unlink(), 'testing_list.txt, the list of a split, cannot be read: '),
    (lambda folder: (folder / 'validation_list.txt').write_bytes(b'\xff\xfe'), 'validation_list.txt, the list of a'),
    (lambda folder: (folder / 'testing_list.txt').write_text('<html>none</html>'), 'lines such as .*<html>none'),
    (lambda folder: (folder / 'testing_list.txt').write_text('../yes/a.wav'), r"lines such as .*found \['\.\./yes/a"),
    (lambda folder: (folder / 'testing_list.txt').write_text(''), 'lines such as .*found none'),
    (lambda folder: next(iter((folder / 'no').glob('*4_*.wav'))).unlink(), r"lacks 1 files of its lists, such .*'no/"),
    (lambda folder: (folder / 'testing_list.txt').write_text(
        '\n'.join(line for line in (folder / 'testing_list.txt').read_text().split() if not line.startswith('go/'))),
     r"expected the clips .*'test': 10}, found .*'test': 9}; remove .* and pass download=True"),
    (lambda folder: next((folder / 'no').glob('*0_*.wav')).unlink(), r"expected the clips {'train': 30, .*'train': 29"),
])
def test_damaged_folders_are_reported(tmp_path, folder, name, change, message):
    change(folder)
    with pytest.raises(ValueError, match=f'^[^\n]*{message}[^\n]*$'):
        create_sequence_dataset(name, tmp_path, 'test')


def test_a_damaged_clip_is_an_error_of_its_item(tmp_path, folder, caplog):
    names = sorted(path.name for path in (folder / 'yes').iterdir())
    os.truncate(folder / 'yes' / names[0], 3000)
    (folder / 'yes' / names[1]).write_bytes(b'')
    dataset = create_sequence_dataset('speech', tmp_path, 'train')
    line, = caplog.messages
    assert 'skipped 2 of 30 clips in mean and standard deviation, such as: ' in line
    assert f'{folder}/yes/{names[0]} is damaged' in line
    by_name = {os.path.basename(dataset.name(index)): index for index in range(len(dataset))}
    for name in names[:2]:
        with pytest.raises(ValueError, match=f'yes/{name} is'):
            dataset[by_name[name]]
    assert dataset[by_name[names[2]]][0].isfinite().all()
    (folder / 'yes' / names[2]).unlink()
    with pytest.raises(OSError, match=names[2]):
        dataset[by_name[names[2]]]


def test_a_damaged_clip_has_no_coefficients(tmp_path, folder):
    path = sorted((folder / 'stop').iterdir())[1]
    content, before = path.read_bytes(), made.below(tmp_path)
    path.write_bytes(content[:3000])
    with pytest.raises(ValueError, match=f'^{path} is damaged'):
        create_sequence_dataset('speech-mfcc', tmp_path, 'train')
    assert made.below(tmp_path) == before
    path.write_bytes(content)
    assert len(create_sequence_dataset('speech-mfcc', tmp_path, 'train')) == 30


def test_a_file_that_may_not_be_read_is_reported(tmp_path, folder, monkeypatch):

    def refuse(path):
        raise PermissionError(13, 'Permission denied', str(path))

    monkeypatch.setattr(speech, 'load_wav', refuse)
    with pytest.raises(ValueError, match=r'^[^\n]*\.wav cannot be read: Permission denied$'):
        create_sequence_dataset('speech-mfcc', tmp_path, 'train')


def test_silence_alone_is_no_training_split(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(speech, 'load_wav', lambda path: torch.zeros(16000))
    with pytest.raises(ValueError, match='has no sound to train on: 30 of 30 clips are readable'):
        create_sequence_dataset('speech', tmp_path, 'train')


# --- cached coefficients ---


def test_coefficients_are_computed_once(tmp_path, folder, monkeypatch):
    first = {split: create_sequence_dataset('speech-mfcc', tmp_path, split) for split in made.EACH}
    monkeypatch.setattr(speech, 'mfcc', lambda samples: pytest.fail('computed again'))
    for split, dataset in first.items():
        again = create_sequence_dataset('speech-mfcc', tmp_path, split)
        assert again.labels == dataset.labels and torch.equal(again[2][0], dataset[2][0])
    (folder.parent / 'speech-mfcc-train.safetensors').unlink()  # the file of the test split has the statistics
    assert torch.equal(create_sequence_dataset('speech-mfcc', tmp_path, 'test')[2][0], first['test'][2][0])


@pytest.mark.parametrize('name, file', [('speech', 'speech-statistics'), ('speech-mfcc', 'speech-mfcc-train')])
def test_tensors_of_other_files_are_computed_again(tmp_path, folder, caplog, name, file):
    path = next((folder / 'yes').glob('*1_*.wav'))
    before = create_sequence_dataset(name, tmp_path, 'train')[0][0]
    path.write_bytes(made.sound(77, 12000))
    assert not torch.equal(create_sequence_dataset(name, tmp_path, 'train')[0][0], before)
    assert f'{file}.safetensors was computed from other files or by another version; recomputing it' in caplog.text
