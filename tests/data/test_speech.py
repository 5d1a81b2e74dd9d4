"""Speech Commands: the sound files, the splits, the coefficients that are kept, and damaged folders."""
import io
import os
import shutil
import tarfile
import threading
import time
import urllib.response
import wave

import made_sequences as made
import numpy as np
import pytest
import torch

from smpconv_models.data import cache, create_sequence_dataset, speech
from smpconv_models.utils import download

NAMES = ('speech', 'speech-mfcc')


def below(folder):
    """All that lies in a folder, but for locks."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.suffix != '.lock')


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


@pytest.mark.parametrize('content, told', [
    (b'', 'is not a WAV file or is damaged: EOFError'),
    (b'<html>' * 100, 'is not a WAV file or is damaged: file does not start with RIFF id'),
    (made.sound(0)[:20], 'is not a WAV file or is damaged'),
    (made.sound(0)[:9000], 'is damaged: expected 32000 bytes of sound by its header, found 8956'),
    (made.sound(0, channels=2), 'expected 1 channel of 16 bits at 16000 Hz, found 2 of 16 at 16000 Hz'),
    (made.sound(0, width=1), 'found 1 of 8 at 16000 Hz'),
    (made.sound(0, rate=8000), 'found 1 of 16 at 8000 Hz'),
    (made.sound(0, samples=16001), 'expected 1 to 16000 samples, found 16001'),
    (made.sound(0, samples=0), 'expected 1 to 16000 samples, found 0'),
])
def test_damaged_sound_is_told(tmp_path, content, told):
    with pytest.raises(ValueError, match=f'^[^\n]*clip.wav[^\n]*{told}[^\n]*$'):
        speech.load_wav(written(tmp_path, content))


def test_a_header_of_any_size_takes_no_memory(tmp_path):
    content = bytearray(made.sound(0))
    content[40:44] = (2 ** 32 - 2).to_bytes(4, 'little')  # of the data
    with pytest.raises(ValueError, match='expected 1 to 16000 samples, found 2147483647'):
        speech.load_wav(written(tmp_path, bytes(content)))


# --- splits ---


@pytest.mark.parametrize('name', NAMES)
def test_the_splits_are_the_lists(tmp_path, name):
    folder = made.make_speech(tmp_path)
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


def test_items_are_the_files_normalised_by_all_training_samples(tmp_path):
    made.make_speech(tmp_path)
    train, test = (create_sequence_dataset('speech', tmp_path, split) for split in ('train', 'test'))
    samples = torch.stack([speech.load_wav(train.name(index)) for index in range(30)]).double()
    std, mean = torch.std_mean(samples, correction=0)
    expected = ((speech.load_wav(test.name(4)).double() - mean) / std).float().unsqueeze(0)
    torch.testing.assert_close(test[4][0], expected, atol=1e-5, rtol=1e-5)


def test_coefficients_are_normalised_each_over_the_training_split(tmp_path):
    made.make_speech(tmp_path)
    train, test = (create_sequence_dataset('speech-mfcc', tmp_path, split) for split in ('train', 'test'))
    found = speech.mfcc(torch.stack([speech.load_wav(train.name(index)) for index in range(30)])).double()
    std, mean = torch.std_mean(found, dim=(0, 2), correction=0)
    expected = ((speech.mfcc(speech.load_wav(test.name(4))) - mean[:, None]) / std[:, None]).float()
    torch.testing.assert_close(test[4][0], expected, atol=1e-4, rtol=1e-4)


# --- the archive ---


@pytest.mark.parametrize('name', NAMES)
def test_an_archive_is_downloaded_and_unpacked_once(tmp_path, monkeypatch, name):
    path = made.publish_speech(tmp_path / 'published.tar.gz', monkeypatch)
    root = tmp_path / 'data'
    first = create_sequence_dataset(name, root, 'test', download=True)
    path.unlink()
    (root / speech.ARCHIVE).unlink()
    for permitted in (False, True):
        assert torch.equal(create_sequence_dataset(name, root, 'test', permitted)[3][0], first[3][0])
    assert not list(root.rglob('*.partial'))


def test_an_archive_that_was_put_there_by_hand_is_unpacked(tmp_path, monkeypatch):
    made.publish_speech(tmp_path / speech.ARCHIVE, monkeypatch)
    assert len(create_sequence_dataset('speech', tmp_path, 'train')) == 30


def test_of_many_processes_one_downloads(tmp_path, monkeypatch):
    """Threads here: a lock of another file handle is another process's."""
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
    found = []
    threads = [threading.Thread(target=
        lambda: found.append(create_sequence_dataset('speech', tmp_path / 'data', 'test', True)))
               for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(dataset) for dataset in found] == [10] * 3 and len(fetched) == len(unpacked) == 1


@pytest.mark.parametrize('change', ['missing', 'html', 'truncated'])
def test_a_failed_download_leaves_nothing_and_the_next_succeeds(tmp_path, monkeypatch, change):
    path = made.publish_speech(tmp_path / 'published.tar.gz', monkeypatch)
    content = path.read_bytes()
    path.unlink()
    if change != 'missing':
        path.write_bytes(b'<html>login</html>' if change == 'html' else content[:-1000])
    root = tmp_path / 'data'
    told = r'^file://[^\n]*gz cannot be downloaded \([^\n]*; the file can be put at [^\n]*v0.02.tar.gz by hand$'
    with pytest.raises(ValueError, match=told):
        create_sequence_dataset('speech', root, 'train', download=True)
    assert below(root) == []
    path.write_bytes(content)
    assert len(create_sequence_dataset('speech', root, 'train', download=True)) == 30


def test_a_download_goes_on_where_it_broke_off_and_what_was_unpacked_is_removed(tmp_path, monkeypatch):
    path = made.publish_speech(tmp_path / 'published.tar.gz', monkeypatch)
    content = path.read_bytes()
    asked = []

    def open_resumable(url, part):
        start = part.stat().st_size
        asked.append(start)
        answer = urllib.response.addinfourl(
            io.BytesIO(content[start:]), {'Content-Length': len(content) - start}, url, 206)
        return answer

    monkeypatch.setattr(download, 'open_resumable', open_resumable)
    root = tmp_path / 'data'
    left = root / 'SpeechCommands' / 'speech_commands_v0.02.partial' / 'yes' / 'old.wav'
    left.parent.mkdir(parents=True)
    left.write_bytes(b'')
    (root / f'{speech.ARCHIVE}.part').write_bytes(content[:1000])
    create_sequence_dataset('speech', root, 'train', download=True)
    assert asked == [1000]
    assert not list(root.rglob('*.part*')) and not list(root.rglob('old.wav'))
    assert (root / speech.ARCHIVE).read_bytes() == content


def test_a_server_that_cannot_resume_sends_the_whole(tmp_path, monkeypatch):
    path = made.publish_speech(tmp_path / 'published.tar.gz', monkeypatch)  # file:// is one
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / f'{speech.ARCHIVE}.part').write_bytes(b'of another try')
    create_sequence_dataset('speech', tmp_path / 'data', 'train', download=True)
    assert (tmp_path / 'data' / speech.ARCHIVE).read_bytes() == path.read_bytes()


def test_a_page_in_place_of_the_file_keeps_what_has_come(tmp_path, monkeypatch):
    made.publish_speech(tmp_path / 'published.tar.gz', monkeypatch)
    monkeypatch.setattr(download, 'open_resumable', lambda url, part: urllib.response.addinfourl(
        io.BytesIO(b'<html>log in'), {'Content-Type': 'text/html; charset=utf-8'}, url, 200))
    part = tmp_path / 'data' / f'{speech.ARCHIVE}.part'
    part.parent.mkdir()
    part.write_bytes(b'what has come')
    with pytest.raises(ValueError, match=r'the server sends a page in place of the file.; what there is .*\.part; the'):
        create_sequence_dataset('speech', tmp_path / 'data', 'train', download=True)
    assert part.read_bytes() == b'what has come'


def test_a_connection_that_ends_keeps_what_has_come(tmp_path, monkeypatch):
    path = made.publish_speech(tmp_path / 'published.tar.gz', monkeypatch)
    content = path.read_bytes()
    monkeypatch.setattr(download, 'open_resumable', lambda url, part: urllib.response.addinfourl(
        io.BytesIO(content[:1000]), {'Content-Length': len(content)}, url, 206))
    told = f'the connection ended after 1000 of {len(content)} bytes.; what there is of it is kept in .*gz.part; the'
    with pytest.raises(ValueError, match=told):
        create_sequence_dataset('speech', tmp_path / 'data', 'train', download=True)
    assert below(tmp_path / 'data') == [f'{speech.ARCHIVE}.part']


def test_another_archive_is_not_unpacked(tmp_path, monkeypatch):
    path = made.publish_speech(tmp_path / speech.ARCHIVE, monkeypatch)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    for permitted in (False, True):
        with pytest.raises(ValueError, match=r'gz is damaged, or another file: its SHA-256 is .*remove it and pass'):
            create_sequence_dataset('speech', tmp_path, 'train', permitted)
    assert below(tmp_path) == [speech.ARCHIVE]


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
    assert below(tmp_path) == ['root', 'root/SpeechCommands', f'root/{speech.ARCHIVE}']


@pytest.mark.parametrize('change', [lambda content: content[:len(content) // 2], lambda content: b'x' * 5000,
                                    lambda content: b''])
def test_damaged_archives_are_told(tmp_path, monkeypatch, change):
    """Were their checksums right."""
    path = made.publish_speech(tmp_path / speech.ARCHIVE, monkeypatch)
    path.write_bytes(change(path.read_bytes()))
    monkeypatch.setattr(speech, 'SHA256', made.sha256(path))
    with pytest.raises(ValueError, match=r'^[^\n]*gz cannot be unpacked to [^\n]*v0.02: \w+Error [^\n]*$'):
        create_sequence_dataset('speech', tmp_path, 'train')
    assert below(tmp_path) == ['SpeechCommands', speech.ARCHIVE]


def test_a_full_disk_leaves_nothing_and_the_next_succeeds(tmp_path, monkeypatch):
    made.publish_speech(tmp_path / speech.ARCHIVE, monkeypatch)
    extract, calls = tarfile.TarFile.extract, []

    def full(*args, **options):
        calls.append(args)
        if len(calls) > 5:
            raise OSError(28, 'No space left on device', 'x.wav')
        extract(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, 'extract', full)
        with pytest.raises(ValueError, match=r'^[^\n]*cannot be unpacked to [^\n]*No space left on device[^\n]*$'):
            create_sequence_dataset('speech', tmp_path, 'train')
    assert below(tmp_path) == ['SpeechCommands', speech.ARCHIVE]
    assert len(create_sequence_dataset('speech', tmp_path, 'train')) == 30


def test_an_interrupted_unpacking_leaves_nothing(tmp_path, monkeypatch):
    made.publish_speech(tmp_path / speech.ARCHIVE, monkeypatch)

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(tarfile.TarFile, 'extract', interrupt)
    with pytest.raises(KeyboardInterrupt):
        create_sequence_dataset('speech', tmp_path, 'train')
    assert below(tmp_path) == ['SpeechCommands', speech.ARCHIVE]


# --- folders ---


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('change, told', [
    (lambda folder: shutil.rmtree(folder / 'left'), r"of wav files for each of .*found none for \['left'\]"),
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
def test_damaged_folders_are_told(tmp_path, name, change, told):
    change(made.make_speech(tmp_path))
    with pytest.raises(ValueError, match=f'^[^\n]*{told}[^\n]*$'):
        create_sequence_dataset(name, tmp_path, 'test')


def test_a_damaged_clip_is_an_error_of_its_item(tmp_path, caplog):
    folder = made.make_speech(tmp_path)
    names = sorted(path.name for path in (folder / 'yes').iterdir())
    os.truncate(folder / 'yes' / names[0], 3000)
    (folder / 'yes' / names[1]).write_bytes(b'')
    dataset = create_sequence_dataset('speech', tmp_path, 'train')
    message, = caplog.messages
    assert 'skipped 2 of 30 clips in mean and standard deviation, such as: ' in message
    assert f'{folder}/yes/{names[0]} is damaged' in message
    by_name = {os.path.basename(dataset.name(index)): index for index in range(len(dataset))}
    for name in names[:2]:
        with pytest.raises(ValueError, match=f'yes/{name} is'):
            dataset[by_name[name]]
    assert dataset[by_name[names[2]]][0].isfinite().all()
    (folder / 'yes' / names[2]).unlink()
    with pytest.raises(OSError, match=names[2]):
        dataset[by_name[names[2]]]


def test_a_damaged_clip_has_no_coefficients(tmp_path):
    folder = made.make_speech(tmp_path)
    path = sorted((folder / 'stop').iterdir())[1]
    content = path.read_bytes()
    path.write_bytes(content[:3000])
    with pytest.raises(ValueError, match=f'^{path} is damaged'):
        create_sequence_dataset('speech-mfcc', tmp_path, 'train')
    assert below(tmp_path / 'SpeechCommands') == below_folder(folder)
    path.write_bytes(content)
    assert len(create_sequence_dataset('speech-mfcc', tmp_path, 'train')) == 30


def below_folder(folder):
    return sorted([folder.name, *(f'{folder.name}/{name}' for name in below(folder))])


def test_a_file_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    made.make_speech(tmp_path)

    def refuse(path):
        raise PermissionError(13, 'Permission denied', str(path))

    monkeypatch.setattr(speech, 'load_wav', refuse)
    with pytest.raises(ValueError, match=r'^[^\n]*\.wav cannot be read: Permission denied$'):
        create_sequence_dataset('speech-mfcc', tmp_path, 'train')


def test_statistics_are_made_anew_when_a_damaged_clip_is_mended(tmp_path, caplog):
    path = next((made.make_speech(tmp_path) / 'yes').glob('*1_*.wav'))
    content = path.read_bytes()
    path.write_bytes(content[:3000])
    before = create_sequence_dataset('speech', tmp_path, 'test')[0][0]
    path.write_bytes(content)
    assert not torch.equal(create_sequence_dataset('speech', tmp_path, 'test')[0][0], before)
    assert 'speech-statistics.safetensors was computed from other files or by another version;' in caplog.text


def test_silence_alone_is_no_training_split(tmp_path, monkeypatch):
    made.make_speech(tmp_path)
    monkeypatch.setattr(speech, 'load_wav', lambda path: torch.zeros(16000))
    with pytest.raises(ValueError, match='has no sound to train on: 30 of 30 clips are readable'):
        create_sequence_dataset('speech', tmp_path, 'train')


# --- what is kept ---


def test_coefficients_are_computed_once(tmp_path, monkeypatch):
    made.make_speech(tmp_path)
    first = {split: create_sequence_dataset('speech-mfcc', tmp_path, split) for split in made.EACH}
    monkeypatch.setattr(speech, 'mfcc', lambda samples: pytest.fail('computed again'))
    for split, dataset in first.items():
        again = create_sequence_dataset('speech-mfcc', tmp_path, split)
        assert again.labels == dataset.labels and torch.equal(again[2][0], dataset[2][0])


def test_held_out_coefficients_need_no_training_clips_once_they_are_kept(tmp_path, monkeypatch):
    made.make_speech(tmp_path)
    first = create_sequence_dataset('speech-mfcc', tmp_path, 'test')[2][0]
    (tmp_path / 'SpeechCommands' / 'speech-mfcc-train.safetensors').unlink()
    monkeypatch.setattr(speech, 'mfcc', lambda samples: pytest.fail('computed again'))
    assert torch.equal(create_sequence_dataset('speech-mfcc', tmp_path, 'test')[2][0], first)


def test_coefficients_of_other_files_are_computed_anew(tmp_path, caplog):
    folder = made.make_speech(tmp_path)
    create_sequence_dataset('speech-mfcc', tmp_path, 'train')
    path = next((folder / 'yes').glob('*2_*.wav'))
    path.write_bytes(made.sound(77))
    create_sequence_dataset('speech-mfcc', tmp_path, 'train')
    assert 'speech-mfcc-train.safetensors was computed from other files or by another version;' in caplog.text


KEPT = {'a': torch.arange(6.).reshape(2, 3), 'b': torch.tensor(2.)}


def kept(path, make=lambda: dict(KEPT), key='1'):
    found = cache.cached_tensors(path, key, make)
    assert found.keys() == KEPT.keys() and all(torch.equal(found[name], KEPT[name]) for name in KEPT)
    return path


@pytest.mark.parametrize('change, told', [
    (lambda content: content[:50], 'cannot be read'),
    (lambda content: b'', 'cannot be read'),
    (lambda content: b'<html>' * 100, 'cannot be read'),
    (lambda content: content[:-1] + bytes([content[-1] ^ 1]), 'is damaged: its checksum differs'),
    (lambda content: (2 ** 62).to_bytes(8, 'little') + content[8:], 'cannot be read'),
])
def test_a_damaged_cache_is_made_anew_loudly(tmp_path, caplog, change, told):
    path = kept(tmp_path / 'kept.safetensors')
    path.write_bytes(change(path.read_bytes()))
    kept(path)
    message, = caplog.messages
    assert f'{path} {told}' in message and 'recomputing it' in message and '\n' not in message
    kept(path, lambda: pytest.fail('made again'))
    assert below(tmp_path) == ['kept.safetensors']


def test_a_cache_of_another_key_is_made_anew(tmp_path):
    path = kept(tmp_path / 'kept.safetensors')
    made_again = []
    kept(path, lambda: made_again.append(1) or dict(KEPT), key='2')
    kept(path, lambda: pytest.fail('made again'), key='2')
    assert made_again == [1]


def test_a_cache_is_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        path = kept(tmp_path / 'kept.safetensors')
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_of_many_processes_one_makes_them(tmp_path):
    calls = []

    def make():
        calls.append(1)
        time.sleep(0.2)
        return dict(KEPT)

    threads = [threading.Thread(target=kept, args=(tmp_path / 'kept.safetensors', make)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1]


def test_a_failure_leaves_no_cache(tmp_path):
    def fail():
        raise ValueError('no')

    with pytest.raises(ValueError, match='no'):
        cache.cached_tensors(tmp_path / 'kept.safetensors', '1', fail)
    assert below(tmp_path) == []


@pytest.mark.parametrize('where', ['write', 'lock'])
def test_without_a_place_to_keep_them_they_are_made_each_time(tmp_path, monkeypatch, caplog, where):
    def full(*args, **options):
        raise OSError(28, 'No space left on device')

    if where == 'write':
        monkeypatch.setattr(os, 'replace', full)
    else:
        monkeypatch.setattr(download.FileLock, 'acquire', full)
        monkeypatch.setattr(os, 'replace', full)
    kept(tmp_path / 'kept.safetensors')
    assert 'cannot be written, and is recomputed on each use: No space left on device' in caplog.text
    assert below(tmp_path) == []
