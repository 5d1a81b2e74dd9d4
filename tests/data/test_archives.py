"""Archives of Character Trajectories and Speech Commands: downloads, resumed downloads, and extraction."""
import io
import tarfile
import time
import urllib.response

import made_sequences as made
import pytest
import torch
from made_sequences import files_below, in_threads

from smpconv_models.data import characters, create_sequence_dataset, speech
from smpconv_models.utils import download

PUBLISH = {'characters': made.publish_characters, 'speech': made.publish_speech, 'speech-mfcc': made.publish_speech}
ARCHIVES = {'characters': characters.ARCHIVE, 'speech': speech.ARCHIVE}
TRAIN_ITEMS = {'characters': 168, 'speech': 30}


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Path of a complete archive of Speech Commands at its published address."""
    return made.publish_speech(tmp_path / 'published.tar.gz', monkeypatch)


@pytest.fixture
def local_archive(tmp_path, monkeypatch):
    """Path of a complete archive of Speech Commands in the folder of the data set."""
    return made.publish_speech(tmp_path / speech.ARCHIVE, monkeypatch)


def response(content, status=206, **headers):
    return lambda url, part: urllib.response.addinfourl(io.BytesIO(content), headers, url, status)


@pytest.mark.parametrize('name', PUBLISH)
def test_an_archive_is_downloaded_once(tmp_path, monkeypatch, name):
    path, root = PUBLISH[name](tmp_path / 'published', monkeypatch), tmp_path / 'data'
    first = create_sequence_dataset(name, root, 'test', download=True)
    path.unlink()
    if name != 'characters':  # the extracted files are enough
        (root / speech.ARCHIVE).unlink()
    for permitted in (False, True):
        again = create_sequence_dataset(name, root, 'test', permitted)
        assert len(again) == len(first) and torch.equal(again[3][0], first[3][0])
    assert not list(root.rglob('*.part*'))


def test_an_archive_that_the_user_put_there_is_extracted(tmp_path, local_archive):
    assert len(create_sequence_dataset('speech', tmp_path, 'train')) == 30


def test_one_of_several_processes_downloads(tmp_path, monkeypatch, archive):
    """Threads stand for processes, as each has a file handle of its own for the lock."""
    fetched, extracted = [], []

    def fetch(*args):
        fetched.append(args)
        time.sleep(0.2)
        download.fetch(*args)

    def extract_tar(*args):
        extracted.append(args)
        download.extract_tar(*args)

    monkeypatch.setattr(speech, 'fetch', fetch)
    monkeypatch.setattr(speech, 'extract_tar', extract_tar)
    found = in_threads(lambda: create_sequence_dataset('speech', tmp_path / 'data', 'test', True))
    assert [len(dataset) for dataset in found] == [10] * 3 and len(fetched) == len(extracted) == 1


@pytest.mark.parametrize('name', ARCHIVES)
@pytest.mark.parametrize('change', ['missing', 'html', 'truncated'])
def test_a_failed_download_leaves_nothing_and_the_next_succeeds(tmp_path, monkeypatch, name, change):
    path = PUBLISH[name](tmp_path / 'published', monkeypatch)
    content = path.read_bytes()
    path.unlink()
    if change != 'missing':
        path.write_bytes(b'<html>login</html>' if change == 'html' else content[:len(content) // 2])
    root = tmp_path / 'data'
    told = rf'^file://[^\n]*published cannot be downloaded \([^\n]*; the file can be put at {root}/[^\n]* by hand$'
    with pytest.raises(ValueError, match=told) as error:
        create_sequence_dataset(name, root, 'train', download=True)
    assert ARCHIVES[name] in str(error.value) and files_below(root) == []
    path.write_bytes(content)
    assert len(create_sequence_dataset(name, root, 'train', download=True)) == TRAIN_ITEMS[name]


def test_a_download_is_resumed_and_an_interrupted_extraction_is_removed(tmp_path, monkeypatch, archive):
    content, asked = archive.read_bytes(), []

    def open_resumable(url, part):
        start = part.stat().st_size
        asked.append(start)
        return response(content[start:], **{'Content-Length': len(content) - start})(url, part)

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


def test_a_server_that_cannot_resume_sends_the_whole_file(tmp_path, archive):
    """A file:// address cannot resume."""
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / f'{speech.ARCHIVE}.part').write_bytes(b'of another attempt')
    create_sequence_dataset('speech', tmp_path / 'data', 'train', download=True)
    assert (tmp_path / 'data' / speech.ARCHIVE).read_bytes() == archive.read_bytes()


@pytest.mark.parametrize('answer, told, kept', [
    (response(b'<html>log in', 200, **{'Content-Type': 'text/html; charset=utf-8'}),
     r'the server sends a page in place of the file.; what there is .*\.part; the', b'received'),
    (response(bytes(1000), **{'Content-Length': 5000}),
     r'the connection ended after 1008 of 5008 bytes.; what there is of it is kept in .*gz.part; the',
     b'received' + bytes(1000)),
])
def test_a_failed_download_keeps_the_received_bytes(tmp_path, monkeypatch, archive, answer, told, kept):
    monkeypatch.setattr(download, 'open_resumable', answer)
    part = tmp_path / 'data' / f'{speech.ARCHIVE}.part'
    part.parent.mkdir()
    part.write_bytes(b'received')
    with pytest.raises(ValueError, match=told):
        create_sequence_dataset('speech', tmp_path / 'data', 'train', download=True)
    assert part.read_bytes() == kept and files_below(part.parent) == [part.name]


@pytest.mark.parametrize('name', ARCHIVES)
def test_an_archive_with_another_checksum_is_not_opened(tmp_path, monkeypatch, name):
    path = PUBLISH[name](tmp_path / ARCHIVES[name], monkeypatch)
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    monkeypatch.setattr('scipy.io.loadmat', lambda *args, **options: pytest.fail('parsed'))
    for permitted in (False, True):
        with pytest.raises(ValueError, match=r'is damaged, or another file: its SHA-256 is .*remove it and pass'):
            create_sequence_dataset(name, tmp_path, 'train', permitted)
    assert files_below(tmp_path) == [ARCHIVES[name]]


# --- extraction ---


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
def test_members_outside_the_folder_are_rejected(tmp_path, monkeypatch, member):
    made.publish_speech(tmp_path / 'root' / speech.ARCHIVE, monkeypatch, extra=[member])
    with pytest.raises(ValueError, match=r'^[^\n]*gz cannot be unpacked to [^\n]*: \w+Error [^\n]*$'):
        create_sequence_dataset('speech', tmp_path / 'root', 'train')
    assert files_below(tmp_path) == ['root', 'root/SpeechCommands', f'root/{speech.ARCHIVE}']


@pytest.mark.parametrize('change', [
    lambda content: content[:len(content) // 2], lambda content: b'x' * 5000, lambda content: b''])
def test_damaged_archives_are_named(tmp_path, monkeypatch, local_archive, change):
    """An archive whose checksum is correct may be damaged, too."""
    local_archive.write_bytes(change(local_archive.read_bytes()))
    monkeypatch.setattr(speech, 'SHA256', made.sha256(local_archive))
    with pytest.raises(ValueError, match=r'^[^\n]*gz cannot be unpacked to [^\n]*v0.02: \w+Error [^\n]*$'):
        create_sequence_dataset('speech', tmp_path, 'train')
    assert files_below(tmp_path) == ['SpeechCommands', speech.ARCHIVE]


@pytest.mark.parametrize('raised, expected, told', [
    (OSError(28, 'No space left on device', 'x.wav'), ValueError,
     r'^[^\n]*cannot be unpacked to [^\n]*No space left on device[^\n]*$'),
    (KeyboardInterrupt, KeyboardInterrupt, None)])
def test_a_failed_extraction_leaves_nothing_and_the_next_succeeds(
        tmp_path, monkeypatch, local_archive, raised, expected, told):
    extract, calls = tarfile.TarFile.extract, []

    def fail_later(*args, **options):
        calls.append(args)
        if len(calls) > 5:
            raise raised
        extract(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, 'extract', fail_later)
        with pytest.raises(expected, match=told):
            create_sequence_dataset('speech', tmp_path, 'train')
    assert files_below(tmp_path) == ['SpeechCommands', speech.ARCHIVE]
    assert len(create_sequence_dataset('speech', tmp_path, 'train')) == 30
