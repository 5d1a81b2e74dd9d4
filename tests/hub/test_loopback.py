"""Properties of the loopback Hub that the tests of downloads and of publishing do not show."""
import contextlib
import hashlib
import http.client
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants, hf_hub_download
from huggingface_hub.utils import _http
from loopback import LoopbackHub, point_client, set_client

HTTP_LIBRARY = getattr(_http, 'httpx2', None) or _http.httpx
NAME = 'owner/name'
CONFIG = b'{"architecture": "test_resnet"}'
WEIGHTS = bytes(range(256)) * 1200
SIZE = len(WEIGHTS)
FILE = f'/{NAME}/resolve/main/model.safetensors'
CDN = f'/cdn/{NAME}/{hashlib.sha256(WEIGHTS).hexdigest()}/model.safetensors'


@pytest.fixture
def client(monkeypatch, tmp_path):
    """Set up the client of this process."""
    set_client(monkeypatch, tmp_path)
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    close_session()  # its connections may use other proxies
    yield
    close_session()


@pytest.fixture
def hub(client, monkeypatch):
    with LoopbackHub() as hub:
        point_client(monkeypatch, hub.url)
        hub.add_repo(NAME, {'config.json': CONFIG, 'model.safetensors': WEIGHTS})
        yield hub


def raw(url, method='GET', path=FILE, **headers):
    """Send a request without the client; return status, headers and body."""
    connection = http.client.HTTPConnection(url.removeprefix('http://'), timeout=30)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    answer = response.status, response.headers, response.read()
    connection.close()
    return answer


def test_a_download_resumes(hub, tmp_path):
    """The client resumes in the call that lost its connection; older clients resume in the next call."""
    def download():
        return Path(hf_hub_download(NAME, 'model.safetensors', cache_dir=tmp_path, token=False)).read_bytes()

    large = WEIGHTS * 80  # the client keeps whole pieces of 10 MB
    hub.commit(NAME, {'model.safetensors': large})
    fault = hub.fail('/cdn/*', drop='close', at=21_000_000)
    try:
        found = download()
    except HTTP_LIBRARY.RemoteProtocolError:
        found = download()
    assert found == large and fault.seen == 1
    whole, rest = hub.asked('/cdn/*')
    assert 'range' not in whole.headers and rest.headers['range'] == f'bytes={2 * constants.DOWNLOAD_CHUNK_SIZE}-'
    assert rest.status == 206


def test_faults_are_met_in_turn(hub):
    hub.fail('*/config.json', status=500, method='GET')
    hub.fail('*', status=503, times=2)
    asked = [('HEAD', 'config.json'), ('GET', 'config.json'), ('GET', 'model.safetensors'), ('GET', 'config.json')]
    statuses = [raw(hub.url, method, f'/{NAME}/resolve/main/{name}')[0] for method, name in asked]
    assert statuses == [503, 500, 503, 200]
    assert [fault.seen for fault in hub.faults] == [1, 2]
    fault = hub.fail(CDN, flip=0)
    assert raw(hub.cdn_url, 'HEAD', CDN)[0] == 200 and fault.seen == 0  # without a body there is nothing to spoil



def test_threads_and_files_end_with_the_context(client):
    before = set(threading.enumerate())
    with LoopbackHub() as hub:
        hub.add_repo(NAME, {'config.json': CONFIG})
        file, = hub.files(NAME).values()
        idle = http.client.HTTPConnection(hub.url.removeprefix('http://'))
        idle.request('GET', '/api/whoami-v2')
        idle.getresponse().read()
        fault = hub.fail('/hangs', hang=600)
        waiting = http.client.HTTPConnection(hub.url.removeprefix('http://'))
        waiting.request('GET', '/hangs')
        while not fault.seen:
            threading.Event().wait(0.01)
        assert len(set(threading.enumerate()) - before) == 4
        began = time.monotonic()
    assert time.monotonic() - began < 10
    assert set(threading.enumerate()) <= before and not file.exists()
    for connection in (idle, waiting):
        connection.close()


def test_its_own_failure_is_no_fault(client, tmp_path):
    file = tmp_path / 'model.safetensors'
    file.write_bytes(WEIGHTS)
    with pytest.raises(RuntimeError, match='the loopback Hub failed') as caught, LoopbackHub() as hub:
        hub.add_repo(NAME, {file.name: file})
        file.unlink()
        raw(hub.url, path=FILE)
        with contextlib.suppress(http.client.HTTPException, OSError):
            raw(hub.cdn_url, path=CDN)
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_client_that_goes_away_is_no_failure(hub):
    connection = http.client.HTTPConnection(hub.cdn_url.removeprefix('http://'))
    hub.commit(NAME, {'model.safetensors': WEIGHTS * 40})
    digest = hashlib.sha256(WEIGHTS * 40).hexdigest()
    connection.request('GET', f'/cdn/{NAME}/{digest}/model.safetensors')
    connection.getresponse().read(10)
    connection.close()
    assert raw(hub.cdn_url, path=CDN)[2] == WEIGHTS
