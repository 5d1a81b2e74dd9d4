"""Download of the original release's files from a Google Drive on loopback, and when timm loads them."""
import contextlib
import html
import os
import pickle
import socket
import struct
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl

import common
import pytest
import timm
import torch
from common import Call, one_line_error, only_warning, relative_error
from huggingface_hub import close_session, constants
from loopback import LoopbackHub, set_client

from smpconv_models.checkpoint import original
from smpconv_models.models import _pretrained
from smpconv_models.utils import download as transfer
from smpconv_models.utils.hub_download import RepoNotFoundError

TINY = dict(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), kernel_sizes=(13, 11, 9, 7), num_classes=10)
FILE_ID = original.GDRIVE_IDS['smpconv_t']
REPO = f'{_pretrained.HUB_NAMESPACE}/smpconv_t.in1k'

ADDRESS = original._ADDRESS  # before a test changes it

# Pages of Google Drive, shortened.
FORM = '''<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body>
<p class="uc-warning-subcaption">smpconv.pth.tar (327M) is too large for Google to scan for viruses.</p>
<form id="download-form" action="{action}" method="get"><input type="submit" id="uc-download-link" value="Download"/>
<input type="hidden" name="id" value="{id}"><input type="hidden" name="export" value="download">
<input type="hidden" name="confirm" value="t"><input type="hidden" name="uuid" value="a&amp;b"></form></body></html>'''
QUOTA = '''<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head><body><p>Sorry, you can't view
or download this file at this time.</p></body></html>'''
LOGIN = '''<html><head><TITLE>
  Google Drive:
  Sign-in
</TITLE></head><body><form action="https://accounts.google.com/signin" method="post">
<input name="identifier" value=""><input name="continue" value="https://drive.google.com"></form></body></html>'''


class Drive(ThreadingHTTPServer):
    """Google Drive's download server; its attributes set how it answers."""
    daemon_threads = False  # the end waits for them

    def __init__(self):
        super().__init__(('127.0.0.1', 0), _Handler)
        self.files = {}  # id: content
        self.large = True  # asks for confirmation
        self.asks_again = False  # ignores the confirmation
        self.takes_ranges = True
        self.tells_length = True
        self.page = None  # status and HTML of a page sent in place of files
        self.drop = None  # number of bytes of the next file after which the connection ends
        self.reset = False  # whether it then ends with a reset
        self.hang = None  # an Event, set when the silence may end
        self.asked = []  # query and headers of each request
        self.sent = 0  # bytes of files
        self.errors = []  # errors of the server itself
        self.url = f'http://127.0.0.1:{self.server_port}/download'

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.thread.join()
        self.server_close()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # the client has left
            self.errors.append(sys.exc_info()[1])


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        drive, query = self.server, dict(parse_qsl(self.path.partition('?')[2]))
        drive.asked.append((query, dict(self.headers)))
        content = drive.files.get(query.get('id'))
        if drive.hang:
            drive.hang.wait(10)
        if drive.page:
            return self._send_page(*drive.page)
        if content is None:
            return self._send_page(404, '<title>Error 404 (Not Found)!!1</title>')
        sure = query.get('confirm') == 't' and query.get('uuid') == 'a&b' and not drive.asks_again
        if drive.large and not sure:
            return self._send_page(200, FORM.format(action=html.escape(drive.url), id=query['id']))
        self._send_file(content)

    def _send_page(self, status, page, *headers):
        self.send_response(status)
        for header in headers:
            self.send_header(*header)
        self.send_header('Content-Type', 'text/html; charset=utf-8')
        self.end_headers()
        self.wfile.write(page.encode())

    def _send_file(self, content):
        drive, wanted = self.server, self.headers.get('Range') if self.server.takes_ranges else None
        start = int(wanted.removeprefix('bytes=').removesuffix('-')) if wanted else 0
        if wanted and start >= len(content):
            return self._send_page(416, '<title>Error 416</title>', ('Content-Range', f'bytes */{len(content)}'))
        self.send_response(206 if wanted else 200)
        self.send_header('Content-Type', 'application/octet-stream')
        if drive.tells_length:
            self.send_header('Content-Length', str(len(content) - start))
        if wanted:
            self.send_header('Content-Range', f'bytes {start}-{len(content) - 1}/{len(content)}')
        self.end_headers()
        stop, drive.drop = len(content) if drive.drop is None else start + drive.drop, None
        drive.sent += self.wfile.write(content[start:stop])
        if drive.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            self.connection.close()


@pytest.fixture
def released(golden):
    """State dict of the release's code in its names, an image, and its logits."""
    data = golden('imagenet_tiny')
    return common.released(data), data['input'], data['logits']


@pytest.fixture
def content(released, tmp_path_factory):
    path = tmp_path_factory.mktemp('release') / 'file'
    torch.save({'epoch': 3, 'arch': 'SMPConv', 'state_dict': released[0]}, path)
    return path.read_bytes()


@pytest.fixture
def drive(monkeypatch, content):
    with Drive() as drive:
        monkeypatch.setattr(original, '_ADDRESS', drive.url)
        monkeypatch.setenv('no_proxy', '127.0.0.1')
        drive.files[FILE_ID] = content
        yield drive
    assert not drive.errors


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'folder/smpconv_t.pth.tar'


@pytest.fixture
def part(path):
    path.parent.mkdir()
    return path.with_name('smpconv_t.pth.tar.part')


def download(path):
    return original.download_original('smpconv_t', path)


def fails(path, call=download, **kwargs):
    """Return the one line of a call's ValueError."""
    message = one_line_error(call, path, **kwargs)
    assert not path.exists()
    return message


def names(folder):
    return set(os.listdir(folder))


def ranges(drive):
    return [headers.get('Range') for _, headers in drive.asked]


# --- the file ---


def test_the_files_are_the_releases():
    """No other test would fail with other files."""
    assert original.GDRIVE_IDS == {
        'smpconv_t': '1xT9Y4cAj4I6rmNJ28-Mh4_APcsEqeJ1V', 'smpconv_b': '16gd2KFnK1fgdEpOulnCYo2KaPl547zT9',
        'smpconv_cifar': '1aKwORBf-lplfdwB8WEcBRRAL7IA4ejth'}
    assert len(original.SEQUENCE_GDRIVE_IDS) == 6 and not set(original.SEQUENCE_GDRIVE_IDS) & set(original.GDRIVE_IDS)
    assert ADDRESS == 'https://drive.usercontent.google.com/download'


def test_a_large_file(drive, content, path):
    """Drive asks for confirmation by a form."""
    assert download(path) == path and path.read_bytes() == content
    first, second = (query for query, _ in drive.asked)
    assert first == {'id': FILE_ID, 'export': 'download'}
    assert second == {'id': FILE_ID, 'export': 'download', 'confirm': 't', 'uuid': 'a&b'}
    assert names(path.parent) == {path.name}


@pytest.mark.parametrize('tells_length', [True, False])
def test_a_small_file(drive, content, path, tells_length):
    drive.large, drive.tells_length = False, tells_length
    assert download(str(path)).read_bytes() == content
    assert len(drive.asked) == 1


def test_a_file_that_is_there(drive, path):
    path.parent.mkdir()
    path.write_bytes(b'mine')
    assert download(path).read_bytes() == b'mine' and not drive.asked


def test_each_model_has_its_file(drive, content, tmp_path):
    drive.files[original.GDRIVE_IDS['smpconv_b']] = content
    original.download_original('smpconv_b', tmp_path / 'b')
    assert drive.asked[0][0]['id'] == original.GDRIVE_IDS['smpconv_b'] != FILE_ID


def test_a_model_that_is_not_in_the_release(drive, path):
    message = fails(path, lambda path: original.download_original('smpconv_mobile31', path))
    assert 'smpconv_mobile31' in message and 'smpconv_t' in message and not drive.asked


def test_several_processes_download_once(drive, content, path):
    """The processes of a training run: one downloads, the others wait."""
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(download, [path] * 4)) == [path] * 4
    assert path.read_bytes() == content and drive.sent == len(content)


def test_a_folder_that_cannot_be_created(drive, path):
    path.parent.write_bytes(b'')
    assert fails(path).startswith(f'{path.parent} cannot be written') and not drive.asked


# --- interrupted downloads ---


@pytest.mark.parametrize('reset', [False, True])
@pytest.mark.parametrize('large', [False, True])
def test_a_download_is_resumed(drive, content, path, large, reset):
    drive.large, drive.drop, drive.reset = large, 50_000, reset
    message = fails(path)
    part = path.with_name(f'{path.name}.part')
    assert 'smpconv_t' in message and str(part) in message
    begun = part.stat().st_size
    assert begun <= 50_000 and content.startswith(part.read_bytes())
    if not reset:  # a reset loses the bytes under way
        assert begun == 50_000 and f'50000 of {len(content)} bytes' in message
    drive.reset, drive.sent = False, 0
    assert download(path).read_bytes() == content and not part.exists()
    assert ranges(drive)[-1] == (f'bytes={begun}-' if begun else None) and drive.sent == len(content) - begun


@pytest.mark.parametrize('takes_ranges, drops, asked, repeated', [
    (True, 2, 'bytes=60000-', 0), (False, 1, 'bytes=30000-', 30_000)])
def test_a_download_breaks_off_again_or_cannot_resume(drive, content, path, takes_ranges, drops, asked, repeated):
    drive.takes_ranges = takes_ranges
    for _ in range(drops):
        drive.drop = 30_000
        fails(path)
    assert download(path).read_bytes() == content
    assert ranges(drive)[-1] == asked and drive.sent == len(content) + repeated


def test_a_complete_part_is_not_downloaded_again(drive, content, path, part):
    """The download was stopped between the last byte and the check of the file."""
    part.write_bytes(content)
    assert download(path).read_bytes() == content
    assert drive.sent == 0 and not part.exists()


def test_a_part_that_is_longer_than_the_file(drive, content, path, part):
    """Status 416."""
    part.write_bytes(content + b'more')
    message = fails(path)
    assert 'remove' in message and str(part) in message and part.exists()
    part.unlink()
    assert download(path).read_bytes() == content


def test_a_part_of_another_file(drive, content, path, part):
    part.write_bytes(bytes(50_000))
    assert str(part) in fails(path) and not part.exists()
    assert download(path).read_bytes() == content


def test_a_server_that_is_not_reachable(monkeypatch, path):
    with contextlib.closing(socket.socket()) as free:
        free.bind(('127.0.0.1', 0))
        url = f'http://127.0.0.1:{free.getsockname()[1]}/download'
    monkeypatch.setattr(original, '_ADDRESS', url)
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    message = fails(path)
    assert 'smpconv_t' in message and url in message and 'refused' in message


def test_silence(drive, path, monkeypatch):
    monkeypatch.setattr(transfer, '_TIMEOUT', 0.1)
    drive.hang = threading.Event()
    try:
        assert 'timed out' in fails(path)
    finally:
        drive.hang.set()


# --- other answers than the file ---


@pytest.mark.parametrize(('page', 'said'), [
    (QUOTA, 'Google Drive - Quota exceeded'), (LOGIN, 'Google Drive: Sign-in'), ('', 'without a title'),
    ('<html><body>Sign in to this network<form><input name="user"></form>', 'without a title'),
    (FORM.format(action='', id='another'), 'Virus scan warning'),
    (f'<title>{"long " * 1000}</title>', 'long long'),
])
@pytest.mark.parametrize('begun', [b'', b'PK begun'])
def test_a_page(drive, path, part, page, said, begun):
    if begun:
        part.write_bytes(begun)
    drive.page = 200, page
    message = fails(path)
    assert said in message and 'Google Drive' in message and 'try later' in message and len(message) < 600
    assert len(drive.asked) == 1
    assert part.read_bytes() == begun if begun else not part.exists()


def test_a_form_again_and_again(drive, path):
    drive.asks_again = True
    assert 'again and again' in fails(path) and len(drive.asked) == 3


@pytest.mark.parametrize('status', [403, 404, 429, 500, 503])
def test_a_status(drive, content, path, status):
    drive.page = status, QUOTA
    message = fails(path)
    assert str(status) in message and 'smpconv_t' in message and drive.url in message
    assert not names(path.parent)
    drive.page = None
    assert download(path).read_bytes() == content


@pytest.mark.parametrize('damage', ['truncated', 'flipped', 'text', 'empty', 'code'])
def test_a_file_that_is_no_checkpoint(drive, content, path, tmp_path, damage):
    """The number of bytes is the one that Drive announces."""
    middle = len(content) // 2
    drive.files[FILE_ID] = {
        'truncated': content[:-1000], 'text': b'not a checkpoint', 'empty': b'',
        'flipped': content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:],
        'code': pickle.dumps({'state_dict': Call(open, str(tmp_path / 'trap'), 'w')}, protocol=2)}[damage]
    assert 'smpconv_t.pth.tar.part' in fails(path)
    assert not names(path.parent) and not (tmp_path / 'trap').exists()
    drive.files[FILE_ID] = content
    assert download(path).read_bytes() == content


# --- when timm takes it ---


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Hub without any repository; connections, cache and token of its client are the test's."""
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    close_session()
    with LoopbackHub() as hub:
        set_client(monkeypatch, tmp_path, hub.url)
        yield hub
    close_session()


def create(**kwargs):
    overlay = dict(num_classes=10, **kwargs.pop('overlay', {}))
    return timm.create_model('smpconv_t', pretrained=True, pretrained_cfg_overlay=overlay, **TINY, **kwargs).eval()


@pytest.mark.parametrize('cache_dir', [None, 'mine'])
def test_without_a_repository_timm_loads_the_original_file(hub, drive, released, tmp_path, caplog, cache_dir):
    _, image, logits = released
    kwargs = {'cache_dir': tmp_path / cache_dir} if cache_dir else {}
    model = create(**kwargs)
    assert relative_error(model(image), logits) < 1e-5
    assert REPO in only_warning(caplog) and 'original file' in only_warning(caplog)
    folder = tmp_path / cache_dir if cache_dir else tmp_path / 'torch/hub/checkpoints'
    assert model.pretrained_cfg['file'] == str(folder / 'smpconv_t.pth.tar')
    drive.asked.clear()
    assert relative_error(create(**kwargs)(image), logits) < 1e-5 and not drive.asked


def test_a_downloaded_original_file_needs_no_network(hub, drive, released, monkeypatch, caplog):
    _, image, logits = released
    create()
    caplog.clear()
    hub.fail('*', status=503, times=None)
    assert relative_error(create()(image), logits) < 1e-5 and 'status 503' in only_warning(caplog)
    caplog.clear()
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert relative_error(create()(image), logits) < 1e-5 and 'HF_HUB_OFFLINE' in only_warning(caplog)


@pytest.mark.parametrize('overlay', [dict(hf_hub_id='owner/none', source='hf-hub'), dict(hf_hub_id='owner/none')])
def test_the_original_file_does_not_replace_a_named_repository(hub, drive, tmp_path, overlay):
    message = fails(tmp_path / 'none', lambda _: create(overlay=overlay), kind=RepoNotFoundError)
    assert 'owner/none' in message
    assert not drive.asked


def test_the_original_file_does_not_replace_a_failing_hub(hub, drive, tmp_path):
    hub.fail('*', status=503, times=None)
    message = fails(tmp_path / 'none', lambda _: create())
    assert REPO in message and 'status 503' in message and not drive.asked
    assert 'pass pretrained_cfg_overlay=dict(file=...)' in message


def test_neither_repository_nor_file(hub, drive, tmp_path):
    drive.page = 200, QUOTA
    assert 'Quota exceeded' in fails(tmp_path / 'none', lambda _: create())
