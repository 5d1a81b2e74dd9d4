"""The loopback Hub, held by the real client: what it serves, what it takes, and that every fault reaches the client.

Expectations hold for huggingface_hub 1.0 and later, whose HTTP library is httpx or httpx2: errors go by their names.
"""
import hashlib
import http.client
import os
import subprocess
import sys
import threading
import time
import tracemalloc

import pytest
import torch
from huggingface_hub import HfApi, close_session, constants, file_download, hf_hub_download
from huggingface_hub.utils import RepositoryNotFoundError, _http
from loopback import HTML, LoopbackHub, point_client, set_client
from safetensors.torch import save_file

HTTP_LIBRARY = getattr(_http, 'httpx2', None) or _http.httpx
# httpx's, on how the client uploads
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
CLIENT_ERRORS = (OSError, HTTP_LIBRARY.HTTPError)
NAME = 'owner/name'
CONFIG = b'{"architecture": "test_resnet"}'
WEIGHTS = bytes(range(256)) * 1200
SIZE = len(WEIGHTS)
FILE = f'/{NAME}/resolve/main/model.safetensors'
CDN = f'/cdn/{NAME}/{hashlib.sha256(WEIGHTS).hexdigest()}/model.safetensors'


@pytest.fixture
def slept(monkeypatch, tmp_path):
    """Set up the client of this process without waits; return the seconds for which it would have slept."""
    slept = []
    set_client(monkeypatch, tmp_path)
    monkeypatch.setattr(time, 'sleep', slept.append)
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    close_session()  # its connections may use other proxies
    yield slept
    close_session()


@pytest.fixture
def hub(slept, monkeypatch):
    with LoopbackHub() as hub:
        point_client(monkeypatch, hub.url)
        hub.add_repo(NAME, {'config.json': CONFIG, 'model.safetensors': WEIGHTS})
        yield hub


@pytest.fixture
def download(hub, tmp_path):
    """hf_hub_download from the Hub to the test's cache; gives the bytes."""
    def download(filename='model.safetensors', repo=NAME, token=False, **kwargs):
        path = hf_hub_download(repo, filename, endpoint=hub.url, cache_dir=tmp_path / 'cache', token=token, **kwargs)
        with open(path, 'rb') as file:
            return file.read()
    return download


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token=hub.token)


def failure(call, **kwargs):
    """The error of a call that must fail, and the names of its class and of its causes'."""
    with pytest.raises(CLIENT_ERRORS) as caught:
        call(**kwargs)
    names, error = [], caught.value
    while error is not None:
        names.append(type(error).__name__)
        error = error.__cause__
    return caught.value, names


def told(requests):
    return [f'{request} {request.status}' for request in requests]


def run(script, env, *args):
    """Run a script in a fresh process; return the lines that it printed."""
    done = subprocess.run([sys.executable, '-c', script, *args], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def raw(url, method='GET', path=FILE, **headers):
    """Send a request without the client; return status, headers and body."""
    connection = http.client.HTTPConnection(url.removeprefix('http://'), timeout=30)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    answer = response.status, response.headers, response.read()
    connection.close()
    return answer


# -- reading

def test_a_download_and_the_next_one(hub, download):
    assert download('config.json') == CONFIG
    assert download() == WEIGHTS
    config = f'/{NAME}/resolve/main/config.json'
    assert told(hub.requests) == [f'HEAD {config} 200', f'GET {config} 200', f'HEAD {FILE} 302', f'GET {CDN} 200']
    assert [request.server for request in hub.requests] == ['hub', 'hub', 'hub', 'cdn']
    hub.forget()
    assert (download('config.json'), download()) == (CONFIG, WEIGHTS)
    assert told(hub.requests) == [f'HEAD {config} 200', f'HEAD {FILE} 302']


def test_the_token_stays_with_the_hub(hub, download):
    assert download(token=hub.token) == WEIGHTS
    head, get = hub.requests
    assert head.headers['authorization'] == f'Bearer {hub.token}'
    assert get.server == 'cdn' and hub.token not in str(get.headers)
    assert not any(hub.token in request.path + request.query for request in hub.requests)


def test_revisions(hub, download, api):
    first = hub.repos[NAME].tags['v1'] = hub.repos[NAME].branches['main']
    second = hub.commit(NAME, {'config.json': b'{}', 'new.txt': b'new'}, branch='a/b')
    assert {revision: download('config.json', revision=revision) for revision in (first, 'v1', 'a/b', second)} == {
        first: CONFIG, 'v1': CONFIG, 'a/b': b'{}', second: b'{}'}
    hub.forget()
    assert download('config.json', revision=first) == CONFIG
    assert not hub.requests  # a commit never changes
    assert hub.commit(NAME, {'config.json': None}) == api.model_info(NAME).sha
    assert set(hub.files(NAME)) == {'model.safetensors'}


def test_information_on_a_repository(hub, api):
    commit = hub.commit(NAME, {'logs/x.txt': b'x'})
    info = api.model_info(NAME, revision=commit, files_metadata=True)
    assert (info.id, info.sha, info.private) == (NAME, commit, False)
    assert [file.rfilename for file in info.siblings] == ['config.json', 'logs/x.txt', 'model.safetensors']
    assert {file.rfilename: (file.size, file.lfs.sha256) for file in info.siblings if file.lfs} == {
        'model.safetensors': (SIZE, hashlib.sha256(WEIGHTS).hexdigest())}
    assert api.repo_exists(NAME) and not api.repo_exists('owner/none')


def test_what_is_not_there(hub, download):
    assert failure(download, filename='none')[1][0] == 'RemoteEntryNotFoundError'
    assert failure(download, revision='none')[1][0] == 'RevisionNotFoundError'
    assert failure(download, revision='0' * 40)[1][0] == 'RevisionNotFoundError'
    for token, status in ((False, 401), (hub.token, 404)):
        error, names = failure(download, repo='owner/none', token=token)
        assert (names[0], error.response.status_code) == ('RepositoryNotFoundError', status)
    assert raw(hub.url, path='/nothing/of/this')[0] == 404


def test_who_may_read(hub, download, api):
    hub.add_repo('owner/private', {'a.txt': b'a'}, private=True)
    hub.add_repo('owner/gated', {'a.txt': b'a'}, gated=True)
    assert failure(download, token='hf_wrong')[0].response.status_code == 401
    assert failure(download, filename='a.txt', repo='owner/private')[1][0] == 'RepositoryNotFoundError'
    assert download('a.txt', repo='owner/private', token=hub.read_token) == b'a'
    for token, status in ((False, 401), (hub.token, 403)):
        error, names = failure(download, filename='a.txt', repo='owner/gated', token=token)
        assert (names[0], error.response.status_code) == ('GatedRepoError', status)
    assert api.whoami()['name'] == hub.user
    assert failure(HfApi(hub.url, token='hf_wrong').whoami)[0].response.status_code == 401


@pytest.mark.parametrize(('asked', 'first', 'last'), [
    ('bytes=5-9', 5, 9), ('bytes=5-', 5, SIZE - 1), ('bytes=-3', SIZE - 3, SIZE - 1),
    (f'bytes=5-{2 * SIZE}', 5, SIZE - 1), ('bytes=-0', None, None), (f'bytes={SIZE}-', None, None),
])
def test_ranges(hub, asked, first, last):
    status, headers, body = raw(hub.cdn_url, path=CDN, Range=asked)
    if first is None:
        assert (status, headers['Content-Range']) == (416, f'bytes */{SIZE}')
    else:
        assert (status, headers['Content-Range']) == (206, f'bytes {first}-{last}/{SIZE}')
        assert body == WEIGHTS[first:last + 1]
    assert raw(hub.cdn_url, 'HEAD', CDN)[1]['Accept-Ranges'] == 'bytes'


def test_a_fresh_process_online_and_offline(hub, tmp_path):
    script = '''
import hashlib, sys
from huggingface_hub import hf_hub_download
for name in sys.argv[1:]:
    try:
        print(hashlib.sha256(open(hf_hub_download('owner/name', name), 'rb').read()).hexdigest())
    except OSError as error:
        print(type(error).__name__)
'''
    online, digest = hub.environment(tmp_path / 'home', HF_TOKEN=hub.token), hashlib.sha256(WEIGHTS).hexdigest()
    assert run(script, online, 'model.safetensors') == [digest]
    assert [str(request) for request in hub.requests] == [f'HEAD {FILE}', f'GET {CDN}']
    assert [request.headers.get('authorization') for request in hub.requests] == [f'Bearer {hub.token}', None]
    hub.forget()
    offline = {**online, 'HF_HUB_OFFLINE': '1'}
    assert run(script, offline, 'model.safetensors', 'config.json') == [digest, 'LocalEntryNotFoundError']
    assert not hub.requests


@pytest.mark.slow  # 7 s: a program of its own
def test_timm_pushes_a_model_and_loads_it(hub, tmp_path):
    pushed, loaded = run('''
import hashlib
import timm
def digest(model):
    return hashlib.sha256(b''.join(value.numpy().tobytes() for value in model.state_dict().values())).hexdigest()
model = timm.create_model('test_resnet', num_classes=5)
timm.models.push_to_hf_hub(model, 'owner/timm', safe_serialization=True)
print(digest(model))
print(digest(timm.create_model('hf-hub:owner/timm', pretrained=True)))
''', hub.environment(tmp_path, HF_TOKEN=hub.token))
    assert pushed == loaded
    assert set(hub.files('owner/timm')) == {'README.md', 'config.json', 'model.safetensors'}
    assert [request.method for request in hub.asked('/cdn/owner/timm/*')] == ['GET']


# -- writing

@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / 'folder'
    (folder / 'logs').mkdir(parents=True)
    save_file({'weight': torch.arange(70_000.)}, folder / 'model.safetensors')
    save_file({'weight': torch.arange(7.)}, folder / 'logs/small.safetensors')
    (folder / 'config.json').write_bytes(CONFIG)
    (folder / 'README.md').write_text('---\nlicense: mit\n---\n# A model\n')
    (folder / 'logs/empty.safetensors').touch()
    return folder


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def stored(hub, name, **kwargs):
    return {path: file.read_bytes() for path, file in hub.files(name, **kwargs).items()}


def test_a_folder_goes_up_and_comes_back(hub, api, folder, download):
    assert api.create_repo('tester/new').repo_id == 'tester/new'
    done = api.upload_folder(repo_id='tester/new', folder_path=folder)
    assert done.oid == api.model_info('tester/new').sha
    assert stored(hub, 'tester/new') == contents(folder)
    assert {path: download(path, repo='tester/new') for path in contents(folder)} == contents(folder)
    puts = hub.asked(method='PUT')
    assert len(puts) == 2 and all(put.server == 'cdn' and 'authorization' not in put.headers for put in puts)
    assert len(hub.asked('*/verify')) == 2 and len(hub.asked('*/commit/main')) == 1
    assert not any(hub.token in request.path + request.query for request in hub.requests)


def test_an_update_sends_what_changed(hub, api, folder):
    api.create_repo('tester/new', private=True)
    first = api.upload_folder(repo_id='tester/new', folder_path=folder).oid
    hub.forget()
    assert api.upload_folder(repo_id='tester/new', folder_path=folder).oid == first
    assert not hub.asked(method='PUT') and not hub.asked('*/commit/*')
    save_file({'weight': -torch.arange(70_000.)}, folder / 'model.safetensors')
    (folder / 'config.json').write_bytes(b'{}')
    before = stored(hub, 'tester/new')
    second = api.upload_folder(repo_id='tester/new', folder_path=folder)
    assert len(hub.asked(method='PUT')) == 1
    assert stored(hub, 'tester/new') == contents(folder)
    assert stored(hub, 'tester/new', revision=first) == before
    api.delete_file('README.md', 'tester/new')
    assert 'README.md' not in hub.files('tester/new')
    late = dict(path_or_fileobj=b'x', path_in_repo='x.txt', repo_id='tester/new', parent_commit=second.oid)
    assert failure(api.upload_file, **late)[0].response.status_code == 412
    assert failure(api.delete_file, path_in_repo='none', repo_id='tester/new')[1][0] == 'RemoteEntryNotFoundError'


def test_who_may_write(hub, folder):
    for token, status in ((False, 401), ('hf_wrong', 401), (hub.read_token, 403), (hub.token, 409)):
        client = HfApi(hub.url, token=token)
        assert failure(client.create_repo, repo_id=NAME)[0].response.status_code == status
        if token != hub.token:
            error = failure(client.upload_folder, repo_id=NAME, folder_path=folder)[0]
            assert error.response.status_code == status
    assert client.create_repo(NAME, exist_ok=True).repo_id == NAME
    with pytest.raises(RepositoryNotFoundError):
        client.upload_folder(repo_id='tester/none', folder_path=folder)
    assert set(hub.files(NAME)) == {'config.json', 'model.safetensors'}
    assert raw(hub.cdn_url, 'PUT', f'/upload/{"0" * 64}')[0] == 403  # nobody has agreed on it


def test_an_upload_survives_a_storage_that_fails_once(hub, api, folder, slept):
    fault = hub.fail('/upload/*', status=503)
    api.upload_file(path_or_fileobj=folder / 'model.safetensors', path_in_repo='model.safetensors', repo_id=NAME)
    assert fault.seen == 1 and slept and told(hub.asked(method='PUT'))[0].endswith(' 503')
    assert stored(hub, NAME)['model.safetensors'] == (folder / 'model.safetensors').read_bytes()


def test_a_commit_that_fails_does_nothing_and_one_whose_answer_is_lost_is_done(hub, api):
    file = dict(path_or_fileobj=b'{}', path_in_repo='config.json', repo_id=NAME)
    hub.fail('*/commit/main', status=503, method='POST')
    assert failure(api.upload_file, **file)[0].response.status_code == 503
    assert stored(hub, NAME)['config.json'] == CONFIG
    hub.fail('*/commit/main', drop='close', at=0)
    assert failure(api.upload_file, **file)[1][0] == 'RemoteProtocolError'
    assert stored(hub, NAME)['config.json'] == b'{}'


def test_large_files_need_little_memory(hub, api, download, tmp_path):
    size = 120_000_000
    with open(tmp_path / 'large.safetensors', 'wb') as file:
        file.write(b'begin')
        file.truncate(size)
    tracemalloc.start()
    try:
        api.upload_file(path_or_fileobj=tmp_path / 'large.safetensors', path_in_repo='l.safetensors', repo_id=NAME)
        path = hf_hub_download(NAME, 'l.safetensors', endpoint=hub.url, cache_dir=tmp_path, token=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert os.path.getsize(path) == os.path.getsize(hub.files(NAME)['l.safetensors']) == size
    assert peak < size / 2  # the client's own pieces are of 10 MB


# -- faults, each as the client sees it

@pytest.mark.parametrize(('status', 'names'), [
    (401, ['HfHubHTTPError']),
    (403, ['LocalEntryNotFoundError', 'HfHubHTTPError']),
    (404, ['LocalEntryNotFoundError', 'HfHubHTTPError']),
    (429, ['LocalEntryNotFoundError', 'HfHubHTTPError']),
    (500, ['LocalEntryNotFoundError', 'HfHubHTTPError']),
    (503, ['LocalEntryNotFoundError', 'HfHubHTTPError']),
])
def test_a_status(hub, download, slept, status, names):
    fault = hub.fail(FILE, status=status, times=None, headers={'Retry-After': '7'})
    error, found = failure(download)
    assert found[:len(names)] == names and fault.seen == len(hub.requests)
    error = error if len(names) == 1 else error.__cause__
    assert (error.response.status_code, error.response.headers['Retry-After']) == (status, '7')
    hub.forget()
    hub.fail(CDN, status=status, times=None)
    error, found = failure(download)
    assert found[0] == 'HfHubHTTPError' and error.response.status_code == status
    hub.forget()
    assert download() == WEIGHTS


@pytest.mark.parametrize(('status', 'code', 'name'), [
    (401, 'RepoNotFound', 'RepositoryNotFoundError'), (403, 'GatedRepo', 'GatedRepoError'),
    (404, 'EntryNotFound', 'RemoteEntryNotFoundError'), (404, 'RevisionNotFound', 'RevisionNotFoundError'),
])
def test_a_status_with_the_hubs_code(hub, download, status, code, name):
    hub.fail(FILE, status=status, headers={'X-Error-Code': code})
    error, names = failure(download)
    assert (names[0], error.response.status_code) == (name, status)


def test_a_rate_limit_that_passes(hub, download, slept):
    hub.fail(CDN, status=429, headers={'Retry-After': '7'})
    assert download() == WEIGHTS
    assert len(slept) == 1 and told(hub.asked(CDN)) == [f'GET {CDN} 429', f'GET {CDN} 200']


def test_a_cached_file_outlives_the_hub(hub, download):
    assert download() == WEIGHTS
    fault = hub.fail('*', status=500, times=None)
    assert download() == WEIGHTS
    assert fault.seen == 1


def test_a_download_resumes(hub, download):
    """In the call that lost its connection, or, by older clients, in the next."""
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


@pytest.mark.parametrize(('pattern', 'what', 'name', 'message'), [
    (FILE, dict(drop='close'), 'RemoteProtocolError', 'without sending a response'),
    (FILE, dict(drop='reset'), 'ReadError', 'reset by peer'),
    (CDN, dict(drop='reset'), 'ReadError', 'reset by peer'),
    (CDN, dict(drop='close', at=1000), 'RemoteProtocolError', f'received 1000 bytes, expected {SIZE}'),
    (CDN, dict(drop='reset', at=1000), 'ReadError', 'reset by peer'),
    (CDN, dict(resize=-10), 'OSError', f'should be of size {SIZE} but has size {SIZE - 10} '),
    (CDN, dict(resize=10), 'OSError', f'should be of size {SIZE} but has size {SIZE + 10} '),
    (CDN, dict(body=HTML), 'OSError', f'should be of size {SIZE} but has size {len(HTML)} '),
    (FILE, dict(headers={'X-Linked-Size': '17'}), 'OSError', f'should be of size 17 but has size {SIZE} '),
    (FILE, dict(body=HTML), 'LocalEntryNotFoundError', 'cannot find the requested files in the local cache'),
    (FILE, dict(headers={'ETag': None, 'X-Linked-Etag': None}), 'LocalEntryNotFoundError', 'the local cache'),
])
def test_an_answer_that_is_not_whole_or_not_ours(hub, download, pattern, what, name, message):
    fault = hub.fail(pattern, times=None, **what)
    error, names = failure(download)
    assert names[0] == name and message in str(error)
    assert fault.seen
    hub.forget()
    assert download(force_download=True) == WEIGHTS


@pytest.mark.parametrize(('pattern', 'at', 'names'), [
    (FILE, None, ['LocalEntryNotFoundError', 'ReadTimeout']), (CDN, None, ['ReadTimeout']),
    (CDN, 1000, ['ReadTimeout']),
])
def test_silence(hub, download, monkeypatch, pattern, at, names):
    patience = 0.1
    monkeypatch.setattr(constants, 'HF_HUB_DOWNLOAD_TIMEOUT', patience)
    monkeypatch.setattr(file_download, '_ETAG_RETRY_TIMEOUT', patience, raising=False)  # where the client asks again
    fault = hub.fail(pattern, hang=60, at=at, times=None)
    began = time.monotonic()
    assert failure(download, etag_timeout=patience if pattern == FILE else 10)[1][:len(names)] == names
    assert time.monotonic() - began >= patience * fault.seen > 0


def test_a_late_answer_and_a_slow_body(hub, download):
    hub.fail(FILE, hang=0.3)
    hub.fail(CDN, hang=0.3, at=1000)
    began = time.monotonic()
    assert download() == WEIGHTS
    assert time.monotonic() - began >= 0.6


def test_a_flipped_bit_in_whole_and_in_part(hub, download):
    """The client does not compare the content with the sha256 that it was told."""
    hub.fail(CDN, flip=5000, times=None)
    wrong = bytearray(WEIGHTS)
    wrong[5000] ^= 1
    assert download() == bytes(wrong)
    assert raw(hub.cdn_url, path=CDN, Range='bytes=4990-5009')[2] == wrong[4990:5010]
    assert raw(hub.cdn_url, path=CDN, Range='bytes=6000-6009')[2] == WEIGHTS[6000:6010]


@pytest.mark.parametrize('etag', ['../../../../evil', '0' * 64])
@pytest.mark.parametrize('filename', ['config.json', 'model.safetensors'])
def test_an_etag_that_is_not_the_files(hub, filename, etag):
    def seen():
        return file_download.get_hf_file_metadata(f'{hub.url}/{NAME}/resolve/main/{filename}', token=False).etag
    true = seen()
    hub.fail('*/resolve/*', etag=f'"{etag}"')
    assert seen() == etag != true == seen()


def test_faults_are_met_in_turn(hub):
    hub.fail('*/config.json', status=500, method='GET')
    hub.fail('*', status=503, times=2)
    asked = [('HEAD', 'config.json'), ('GET', 'config.json'), ('GET', 'model.safetensors'), ('GET', 'config.json')]
    statuses = [raw(hub.url, method, f'/{NAME}/resolve/main/{name}')[0] for method, name in asked]
    assert statuses == [503, 500, 503, 200]
    assert [fault.seen for fault in hub.faults] == [1, 2]
    fault = hub.fail(CDN, flip=0)
    assert raw(hub.cdn_url, 'HEAD', CDN)[0] == 200 and fault.seen == 0  # without a body there is nothing to spoil


# -- the Hub itself

def test_threads_and_files_end_with_the_context(slept):
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


def test_its_own_failure_is_no_fault(slept, tmp_path):
    file = tmp_path / 'model.safetensors'
    file.write_bytes(WEIGHTS)
    with pytest.raises(RuntimeError, match='the loopback Hub failed') as caught, LoopbackHub() as hub:
        hub.add_repo(NAME, {file.name: file})
        file.unlink()
        failure(hf_hub_download, repo_id=NAME, filename=file.name, endpoint=hub.url, cache_dir=tmp_path, token=False)
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_client_that_goes_away_is_no_failure(hub):
    connection = http.client.HTTPConnection(hub.cdn_url.removeprefix('http://'))
    hub.commit(NAME, {'model.safetensors': WEIGHTS * 40})
    digest = hashlib.sha256(WEIGHTS * 40).hexdigest()
    connection.request('GET', f'/cdn/{NAME}/{digest}/model.safetensors')
    connection.getresponse().read(10)
    connection.close()
    assert raw(hub.cdn_url, path=CDN)[2] == WEIGHTS
