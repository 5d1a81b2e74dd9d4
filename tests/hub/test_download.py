"""Pretrained weights from the Hugging Face Hub and from folders: which are loaded, and the errors for others."""
import contextlib
import json
import os
import pickle
import socket
import time

import pytest
import timm
import torch
from common import Call, only_warning, randomize_
from common import one_line_error as fails
from huggingface_hub import close_session, constants, file_download
from loopback import HTML, Fault, LoopbackHub, point_client, set_client
from safetensors.torch import load_file, save_file

import train
import validate
from smpconv_models.hub import convert as convert_checkpoint
from smpconv_models.hub import load
from smpconv_models.models import _pretrained
from smpconv_models.utils.hub_download import RepoNotFoundError, download_verified, file_sha256

TINY = dict(depths=(1, 1), dims=(4, 8), kernel_sizes=(7, 5))
NAME, HUB_NAME = 'owner/name', 'hf-hub:owner/name'
WEIGHTS, CONFIG = 'model.safetensors', 'config.json'
HEAD, CDN = f'/{NAME}/resolve/main/{WEIGHTS}', f'/cdn/{NAME}/*'
IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope='module', autouse=True)
def session():
    """Fresh connections of the client: old ones may use other proxies."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv('NO_PROXY', '127.0.0.1')
        close_session()
        yield
        close_session()


@pytest.fixture(autouse=True)
def client(monkeypatch, tmp_path):
    """The Hub's client of this process, without waits and tokens; its default cache is in the test's folder."""
    set_client(monkeypatch, tmp_path)
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)


def make(seed=0, name='smpconv_nano', **kwargs):
    return randomize_(timm.create_model(name, **dict(dict(TINY, num_classes=5), **kwargs)), seed).eval()


def save(model, folder, **kwargs):
    tiny = TINY if len(model.stages) == 2 else {}
    timm.models.save_for_hf(model, folder, **{  # which a later timm knows itself
        'model_args': {**tiny, 'num_classes': model.num_classes, 'in_chans': model.in_chans},
        'safe_serialization': True, **kwargs})
    return folder


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope='module')
def model():
    return make()


@pytest.fixture(scope='module')
def folder(model, tmp_path_factory):
    return save(model, tmp_path_factory.mktemp('saved') / 'model')


@pytest.fixture
def hub(monkeypatch, folder):
    with LoopbackHub() as hub:
        point_client(monkeypatch, hub.url)
        hub.add_repo(NAME, files_of(folder))
        yield hub


def create(name=HUB_NAME, **kwargs):
    return timm.create_model(name, pretrained=True, **kwargs).eval()


def stored(root):
    """Return the names of the files in a folder, without links and the client's locks and marks."""
    found = {path.relative_to(root).as_posix() for path in root.rglob('*') if path.is_file() and not path.is_symlink()}
    return {name for name in found if '.lock' not in name and not name.endswith('CACHEDIR.TAG')}


def blobs(tmp_path):
    """Return the names of the contents in the cache, complete or not."""
    return {name for name in stored(tmp_path) if '/refs/' not in name}


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# --- what is loaded ---


def test_hub_repository(hub, model, tmp_path):
    loaded = create()
    assert torch.equal(loaded(IMAGE), model(IMAGE))
    assert loaded.pretrained_cfg['hf_hub_id'] == NAME and loaded.pretrained_cfg['architecture'] == 'smpconv_nano'
    assert loaded.pretrained_cfg['file'].startswith(str(tmp_path / 'cache'))
    assert [request.method for request in hub.asked(CDN)] == ['GET']


def test_hub_revisions(hub, model, tmp_path):
    first = hub.repos[NAME].branches['main']
    hub.repos[NAME].tags['v1'] = first
    create()  # a new commit replaces the cached one
    other = make(1)
    hub.commit(NAME, files_of(save(other, tmp_path / 'other')))
    assert torch.equal(create()(IMAGE), other(IMAGE))
    for revision in ('v1', first):
        loaded = create(f'{HUB_NAME}@{revision}')
        assert torch.equal(loaded(IMAGE), model(IMAGE))
        assert loaded.pretrained_cfg['hf_hub_id'] == f'{NAME}@{revision}'
    assert torch.equal(create()(IMAGE), other(IMAGE))
    assert len(hub.asked(CDN)) == 2


@pytest.mark.parametrize('serialization', [True, False, 'both'])
def test_local_folder(model, tmp_path, serialization):
    saved = save(model, tmp_path / 'saved', safe_serialization=serialization)
    loaded = create(f'local-dir:{saved}')
    assert torch.equal(loaded(IMAGE), model(IMAGE))
    assert loaded.pretrained_cfg['file'].startswith(str(saved))


@pytest.fixture(params=['hf-hub', 'local-dir'])
def source(request, folder):
    if request.param == 'local-dir':
        return f'local-dir:{folder}'
    request.getfixturevalue('hub')
    return HUB_NAME


def test_other_classes_and_none(source, model):
    features = model.forward_features(IMAGE)
    loaded = create(source, num_classes=3)
    assert loaded(IMAGE).shape == (2, 3) and torch.equal(loaded.forward_features(IMAGE), features)
    assert torch.equal(create(source, num_classes=0)(IMAGE), model.forward_head(features, pre_logits=True))


def test_one_input_channel(source, model):
    """timm sums the first kernel over the colors: the outputs for gray images stay the same."""
    grey = IMAGE[:, :1]
    torch.testing.assert_close(create(source, in_chans=1)(grey), model(grey.expand(-1, 3, -1, -1)))


def test_features(source, model):
    backbone, expected = create(source, features_only=True), model.forward_intermediates(IMAGE, intermediates_only=True)
    assert [torch.equal(*pair) for pair in zip(backbone(IMAGE), expected)] == [True, True]
    if source == HUB_NAME:
        assert backbone.pretrained_cfg['hf_hub_id'] == NAME


def test_cache_dir(hub, model, tmp_path):
    assert torch.equal(create(cache_dir=tmp_path / 'mine')(IMAGE), model(IMAGE))
    assert not (tmp_path / 'cache').exists() and (tmp_path / 'mine').is_dir()
    assert download_verified(NAME, WEIGHTS, tmp_path / 'mine').is_relative_to(tmp_path / 'mine')
    assert len(hub.asked(CDN)) == 1


def test_weights_in_the_configuration_are_ignored(tmp_path, model, folder):
    """The weights of a folder or repository are those in its file."""
    config = json.loads((folder / CONFIG).read_text())
    config['pretrained_cfg'].update(state_dict={'a': 1}, file='/etc/hostname', custom_load=True)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    assert torch.equal(create(f'local-dir:{tmp_path}')(IMAGE), model(IMAGE))


def test_weights_in_memory(model):
    overlay = dict(state_dict=model.state_dict(), num_classes=5)
    loaded = create('smpconv_nano', pretrained_cfg_overlay=overlay, **TINY)
    assert torch.equal(loaded(IMAGE), model(IMAGE))


def test_a_plain_name(hub, model):
    repo = f'{_pretrained.HUB_NAMESPACE}/smpconv_t.in1k'
    plain = make(name='smpconv_t', num_classes=1000)
    hub.add_repo(repo, files_of_state(plain, hub))
    loaded = create('smpconv_t', **TINY)
    assert torch.equal(loaded(IMAGE), plain(IMAGE))
    assert loaded.pretrained_cfg['hf_hub_id'] == repo and loaded.pretrained_cfg['tag'] == 'in1k'


def files_of_state(model, hub):
    path = hub.store.folder / WEIGHTS
    save_file(model.state_dict(), path)
    return {WEIGHTS: path}


def test_a_model_without_published_weights_says_so(hub):
    with pytest.raises(RuntimeError, match='No pretrained weights exist for smpconv_mobile31'):
        create('smpconv_mobile31')
    assert not hub.requests


# --- the cache ---


def test_the_second_load_downloads_nothing(hub, model):
    create()
    hub.forget()
    assert torch.equal(create()(IMAGE), model(IMAGE))
    assert {request.method for request in hub.requests} == {'HEAD'}


def test_a_file_that_another_revision_has_too(hub, tmp_path):
    """The cache stores which revision main is, for a later load without network."""
    first = download_verified(NAME, CONFIG)
    second = hub.commit(NAME, {CONFIG: b'{}'})
    assert download_verified(f'{NAME}@{second}', CONFIG) != first
    assert download_verified(NAME, CONFIG).read_bytes() == b'{}'
    hub.fail('*', status=503, times=None)
    assert download_verified(NAME, CONFIG).read_bytes() == b'{}'


def test_offline_from_the_cache(hub, model, monkeypatch, caplog):
    create()
    hub.forget()
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert torch.equal(create()(IMAGE), model(IMAGE))
    assert not hub.requests
    assert not [record for record in caplog.records if record.name.startswith('smpconv_models')]  # as asked for


def test_offline_without_a_cache(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    message = fails(download_verified, NAME, WEIGHTS)
    assert 'HF_HUB_OFFLINE' in message and NAME in message and WEIGHTS in message
    message = fails(create, 'smpconv_t', cache_dir=tmp_path / 'empty')
    assert 'HF_HUB_OFFLINE' in message and 'smpconv_t.in1k' in message
    assert not hub.requests


# --- checksums ---


@pytest.mark.parametrize('has_links', [True, False])
@pytest.mark.parametrize(('filename', 'pattern'), [(WEIGHTS, CDN), (CONFIG, '*/config.json')])
def test_a_bit_flipped_on_the_way(hub, folder, tmp_path, monkeypatch, filename, pattern, has_links):
    """LFS files are named by SHA-256, small files by Git's SHA-1. A file system without links keeps no name."""
    monkeypatch.setattr(file_download, 'are_symlinks_supported', lambda cache_dir=None: has_links)
    fault = hub.fail(pattern, flip=100, method='GET')
    message = fails(download_verified, NAME, filename)
    assert 'its checksum is' in message and filename in message and str(tmp_path / 'cache') in message
    assert fault.seen == 1 and not blobs(tmp_path)
    path = download_verified(NAME, filename)
    assert path.is_symlink() is has_links and path.read_bytes() == (folder / filename).read_bytes()


@pytest.mark.parametrize('offline', [False, True])
@pytest.mark.parametrize('filename', [WEIGHTS, CONFIG])
def test_a_bit_flipped_in_the_cache(hub, folder, tmp_path, monkeypatch, filename, offline):
    path = download_verified(NAME, filename)
    flip(path.resolve())
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', offline)
    message = fails(download_verified, NAME, filename)
    assert 'checksum' in message and str(path) in message
    assert not blobs(tmp_path) and not os.path.lexists(path)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    assert download_verified(NAME, filename).read_bytes() == (folder / filename).read_bytes()


@pytest.mark.parametrize('damage', [False, True])
def test_content_that_several_repositories_share(hub, folder, tmp_path, damage):
    """For a download by Xet the blob is a link, to a file that is named by a hash of Xet's."""
    path = download_verified(NAME, WEIGHTS)
    blob, shared = path.resolve(), tmp_path / 'cache/blobs/ab' / ('ab' * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    if damage:
        flip(shared)
        assert 'checksum' in fails(download_verified, NAME, WEIGHTS)
        assert not any(os.path.lexists(gone) for gone in (path, blob, shared))
    assert download_verified(NAME, WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert shared.exists() is not damage


def test_timm_reports_a_flipped_bit(hub, model):
    hub.fail(CDN, flip=2000)
    assert 'checksum' in fails(create)
    assert torch.equal(create()(IMAGE), model(IMAGE))


@pytest.mark.slow  # 8 s: several programs
def test_a_flipped_bit_in_the_cache_is_reported_in_any_order(hub, tmp_path):
    """The checksum is computed in parallel; the file is removed only after it was read."""
    for _ in range(5):
        create()
        flip(download_verified(NAME, WEIGHTS).resolve())
        assert 'its checksum is' in fails(create)


# --- a server that lies ---


ESCAPES = ['../../../../evil', '../' * 20 + '{}/evil', '{}/evil', 'evil', '0' * 39 + '/', '',
           '0' * 40 + '/../evil', '..', '.']


@pytest.mark.parametrize('name', ESCAPES)
@pytest.mark.parametrize('kind', ['etag', 'commit'])
@pytest.mark.parametrize('filename', [WEIGHTS, CONFIG])
def test_a_path_in_place_of_a_checksum(hub, tmp_path, filename, kind, name):
    name = name.format(tmp_path)
    what = dict(etag=f'"{name}"') if kind == 'etag' else dict(headers={'X-Repo-Commit': name})
    hub.fail('*', times=None, **what)
    message = fails(download_verified, NAME, filename)
    assert 'does not answer as the Hub does' in message and f'{NAME}/{filename}' in message
    assert not stored(tmp_path) and not os.path.exists(tmp_path / 'evil')
    assert not hub.asked(method='GET')


def test_a_path_in_the_answer_to_the_client(hub, folder, tmp_path):
    """The client asks again; the file that it then writes is not read."""
    class Later(Fault):
        asked = 0

        def matches(self, request):
            self.asked += super().matches(request)
            return self.asked > 1 and super().matches(request)

    mine = tmp_path / 'mine'
    mine.write_bytes(b'mine')  # the client takes it for the file; it would write one that does not exist
    hub.faults.append(Later('*/resolve/*', times=None, etag=f'"{mine}"'))
    assert 'does not answer as the Hub does' in fails(download_verified, NAME, WEIGHTS)
    assert mine.read_bytes() == b'mine'
    hub.forget()
    assert download_verified(NAME, WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_a_path_in_place_of_the_commit_of_a_missing_file(hub, tmp_path):
    """The client creates a mark under that name."""
    hub.fail('*', times=None, headers={'X-Repo-Commit': str(tmp_path / 'evil')})
    assert 'none.bin does not exist' in fails(download_verified, NAME, 'none.bin')
    assert not stored(tmp_path)


@pytest.mark.parametrize('filename', ['../../../evil', '/etc/hostname', '..\\evil'])
def test_a_file_name_that_leads_out(hub, tmp_path, filename):
    fails(download_verified, NAME, filename)
    assert not stored(tmp_path)


@pytest.mark.parametrize('repo', ['../..', 'a/b/c', '', 'owner/na me', '/etc', 'owner/..', 'owner/name@../../evil'])
def test_a_name_of_no_repository(hub, tmp_path, repo):
    fails(download_verified, repo, WEIGHTS)
    assert not stored(tmp_path)


# --- a server that fails ---


# Name -> pattern of paths, arguments of the fault, text in the error beside the repository and the file.
FAULTS = {
    **{f'{status}{part}': (pattern, dict(status=status), text)
       for part, pattern in (('', HEAD), ('_of_the_contents', CDN))
       for status, text in ((401, 'HF_TOKEN'), (403, 'HF_TOKEN'), (500, 'status 500'), (503, 'HF_ENDPOINT'))},
    '404_of_the_contents': (CDN, dict(status=404), 'HF_ENDPOINT'),
    '429': (HEAD, dict(status=429, headers={'Retry-After': '7'}), 'too many requests'),
    '429_of_the_contents': (CDN, dict(status=429), 'too many requests'),
    'closed': (HEAD, dict(drop='close'), 'HTTPS_PROXY'),
    'reset': (HEAD, dict(drop='reset'), 'HTTPS_PROXY'),
    'closed_before_the_body': (CDN, dict(drop='close'), 'HF_ENDPOINT'),
    'reset_before_the_body': (CDN, dict(drop='reset'), 'HF_ENDPOINT'),
    'closed_within_the_body': (CDN, dict(drop='close', at=1000), 'HF_ENDPOINT'),
    'reset_within_the_body': (CDN, dict(drop='reset', at=1000), 'HF_ENDPOINT'),
    'silence_within_the_body': (CDN, dict(hang=60, at=1000), 'HF_ENDPOINT'),
    'html': (HEAD, dict(body=HTML), 'HF_ENDPOINT'),
    'html_for_everything': ('*', dict(body=HTML), 'HF_ENDPOINT'),
    'html_of_the_contents': (CDN, dict(body=HTML), 'HF_ENDPOINT'),
    'truncated': (CDN, dict(resize=-10), 'HF_ENDPOINT'),
    'too_long': (CDN, dict(resize=10), 'HF_ENDPOINT'),
    'no_names': (HEAD, dict(headers={'ETag': None, 'X-Linked-Etag': None, 'X-Repo-Commit': None}), 'HF_ENDPOINT'),
    'loop': (HEAD, dict(status=302, headers={'Location': HEAD}), 'HF_ENDPOINT'),
}


@pytest.mark.parametrize('name', FAULTS)
def test_a_fault_without_a_cache(hub, folder, tmp_path, monkeypatch, name):
    pattern, what, text = FAULTS[name]
    monkeypatch.setattr(constants, 'HF_HUB_DOWNLOAD_TIMEOUT', 0.05)
    fault = hub.fail(pattern, times=None, **what)
    message = fails(download_verified, NAME, WEIGHTS)
    assert f'{NAME}/{WEIGHTS}' in message and hub.url in message and text in message
    assert fault.seen and not blobs(tmp_path)
    hub.forget()
    assert download_verified(NAME, WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize('name', [name for name in FAULTS if FAULTS[name][0] != CDN])
def test_a_fault_with_the_file_cached(hub, caplog, name):
    path = download_verified(NAME, WEIGHTS)
    pattern, what, text = FAULTS[name]
    fault = hub.fail(pattern, times=None, **what)
    assert download_verified(NAME, WEIGHTS) == path and fault.seen
    warning = only_warning(caplog)
    assert text in warning and 'cached file' in warning and f'{NAME}/{WEIGHTS}' in warning


def test_a_fault_that_passes(hub, folder):
    """The client retries a few times."""
    hub.fail(CDN, status=429, times=3)
    assert download_verified(NAME, WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize('cached', [False, True])
def test_a_hub_that_is_not_reachable(hub, model, monkeypatch, caplog, cached):
    if cached:
        create()
    with contextlib.closing(socket.socket()) as free:
        free.bind(('127.0.0.1', 0))
        url = f'http://127.0.0.1:{free.getsockname()[1]}'
    point_client(monkeypatch, url)
    if cached:
        assert torch.equal(create()(IMAGE), model(IMAGE))
        assert url in only_warning(caplog)
    else:
        message = fails(download_verified, NAME, WEIGHTS)
        assert f'{NAME}/{WEIGHTS}' in message and url in message and 'HF_ENDPOINT' in message


def test_a_cache_that_cannot_be_written(hub, tmp_path):
    """The error does not blame the network."""
    (tmp_path / 'file').write_bytes(b'')
    message = fails(download_verified, NAME, WEIGHTS, tmp_path / 'file')
    assert f'{NAME}/{WEIGHTS}' in message and str(tmp_path / 'file') in message and 'HF_ENDPOINT' not in message


def test_a_dead_hub_and_a_damaged_cache(hub, monkeypatch):
    """The fallback is checked as well."""
    flip(download_verified(NAME, WEIGHTS).resolve())
    hub.fail('*', status=503, times=None)
    assert 'checksum' in fails(download_verified, NAME, WEIGHTS)


def test_who_may_not_read(hub, monkeypatch):
    hub.add_repo('owner/gated', {WEIGHTS: b'x'}, gated=True)
    hub.add_repo('owner/private', {WEIGHTS: b'x'}, private=True)
    for token in (None, hub.read_token):
        if token:
            monkeypatch.setenv('HF_TOKEN', token)
        message = fails(download_verified, 'owner/gated', WEIGHTS)
        assert 'agreement' in message and f'{hub.url}/owner/gated' in message and 'HF_TOKEN' in message
    assert download_verified('owner/private', WEIGHTS).read_bytes() == b'x'
    monkeypatch.delenv('HF_TOKEN')
    message = fails(download_verified, 'owner/private', 'config.json', kind=RepoNotFoundError)
    assert 'owner/private' in message and 'HF_TOKEN' in message


def test_an_unknown_token(hub, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_wrong')
    message = fails(download_verified, NAME, WEIGHTS)
    assert 'HF_TOKEN' in message and 'hf_wrong' not in message


@pytest.mark.parametrize('token', [None, 'hf_test'])
def test_no_such_repository_revision_or_file(hub, tmp_path, monkeypatch, token):
    if token:
        monkeypatch.setenv('HF_TOKEN', token)
    message = fails(download_verified, 'owner/none', WEIGHTS, kind=RepoNotFoundError)
    assert 'owner/none' in message and hub.url in message
    assert fails(download_verified, f'{NAME}@v9', WEIGHTS) == f'{NAME} has no revision v9'
    assert fails(download_verified, NAME, 'none.bin') == f'{NAME}/none.bin does not exist'
    assert not blobs(tmp_path)


def test_a_removed_repository_with_the_file_cached(hub, caplog):
    path = download_verified(NAME, WEIGHTS)
    del hub.repos[NAME]
    assert download_verified(NAME, WEIGHTS) == path
    assert 'no repository' in only_warning(caplog)


def test_the_token_stays_with_the_hub(hub, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', hub.token)
    download_verified(NAME, WEIGHTS)
    assert {request.headers.get('authorization') for request in hub.requests if request.server == 'hub'} == {
        f'Bearer {hub.token}'}
    get, = hub.asked(CDN)
    assert hub.token not in f'{get.path} {get.query} {get.headers}'


# --- folders and their files ---


def copy(folder, to, change=None, **config):
    """Copy the folder of a saved model with changed weights or configuration."""
    to.mkdir()
    weights = load_file(folder / WEIGHTS)
    if change:
        change(weights)
    save_file(weights, to / WEIGHTS)
    (to / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), **config}))
    return to


def test_a_folder_without_weights(folder, tmp_path):
    to = copy(folder, tmp_path / 'copy')
    (to / WEIGHTS).unlink()
    message = fails(create, f'local-dir:{to}')
    assert str(to) in message and WEIGHTS in message and 'pytorch_model.bin' in message


def test_a_folders_checksum(folder, model, tmp_path):
    to = copy(folder, tmp_path / 'copy')
    (to / CONFIG).write_text(
        json.dumps({**json.loads((to / CONFIG).read_text()), 'sha256': file_sha256(to / WEIGHTS)}))
    assert torch.equal(create(f'local-dir:{to}')(IMAGE), model(IMAGE))
    flip(to / WEIGHTS)
    message = fails(create, f'local-dir:{to}')
    assert 'checksum' in message and str(to / WEIGHTS) in message
    assert (to / WEIGHTS).exists()  # a user's file is not removed


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_not_finite(hub, folder, tmp_path, value):
    def change(weights):
        weights['norm.weight'][3] = value
    to = copy(folder, tmp_path / 'copy', change)
    hub.add_repo('owner/bad', files_of(to))
    for name in (f'local-dir:{to}', 'hf-hub:owner/bad'):
        assert 'not finite: norm.weight' in fails(create, name)


@pytest.mark.parametrize('dump', [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_that_would_run_code(model, tmp_path, dump):
    to, trap = save(model, tmp_path / 'saved', safe_serialization=False), tmp_path / 'trap'
    dump({**model.state_dict(), 'x': Call(os.mkdir, str(trap))}, to / 'pytorch_model.bin')
    assert str(to / 'pytorch_model.bin') in fails(create, f'local-dir:{to}')
    assert not trap.exists()


def test_no_weights_are_taken_from_a_url(tmp_path):
    """timm's own loader would unpickle the download."""
    message = fails(create, 'smpconv_nano', pretrained_cfg_overlay=dict(url='http://127.0.0.1:9/weights.pth'))
    assert 'http://127.0.0.1:9/weights.pth' in message and '`file`' in message


@pytest.mark.parametrize('content, text', [
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n', 'is a Git LFS pointer'),
    (HTML, 'is an HTML or XML page'), (b'', 'is empty'),
])
def test_a_folder_that_was_cloned_without_its_weights(folder, tmp_path, content, text):
    to = copy(folder, tmp_path / 'copy')
    (to / WEIGHTS).write_bytes(content)
    assert text in fails(create, f'local-dir:{to}')


def create_from_file(path, **kwargs):
    return create(
        'smpconv_nano', num_classes=5, pretrained_cfg_overlay=dict(file=str(path), num_classes=5), **kwargs)


def test_the_weights_of_another_variant_are_named(tmp_path):
    path = tmp_path / 'model.pth'
    torch.save(timm.create_model('smpconv_mobile31', num_classes=5).state_dict(), path)
    message = fails(create_from_file, path)
    assert message.startswith(f'{path}: ')
    assert message.endswith('the weights fit smpconv_mobile31 with 5 classes and 3 input channels')


@pytest.mark.parametrize('key', ['state_dict_ema', 'model_ema'])
def test_an_entry_that_timm_takes_is_a_dictionary(model, tmp_path, key):
    """Also where this package takes the other one, as the run says that it is better."""
    path = tmp_path / 'model.pth'
    torch.save({'state_dict': model.state_dict(), 'best_weights': 'state_dict', key: 'a text'}, path)
    assert fails(create_from_file, path, **TINY) == f"{path}: {key} must be a dictionary of tensors, got 'a text'"


@pytest.mark.parametrize('dtype', [torch.int32, torch.complex64])
def test_weights_that_are_no_real_numbers(model, tmp_path, dtype):
    path = tmp_path / 'model.pth'
    torch.save({name: value.to(dtype) for name, value in model.state_dict().items()}, path)
    message = fails(create_from_file, path, **TINY)
    assert 'have other numbers' in message and str(dtype) in message


def test_weights_of_eight_bits(model, tmp_path):
    state = {
        name: value.to(torch.float8_e5m2) if value.is_floating_point() else value
        for name, value in model.state_dict().items()}
    save_file(state, tmp_path / 'model.safetensors')
    loaded = create_from_file(tmp_path / 'model.safetensors', **TINY)
    assert torch.equal(loaded.head.fc.weight, state['head.fc.weight'].float())


def test_a_new_classifier_is_initialized(source):
    classifier = create(source, num_classes=400).head.fc
    assert 0.01 < classifier.weight.std() < 0.03 and not classifier.bias.any()


def test_load_from_repositories_and_their_revisions(hub, model, tmp_path):
    assert torch.equal(load(NAME).eval()(IMAGE), model(IMAGE)) and blobs(tmp_path / 'cache')
    assert load(f'{NAME}@main', cache_dir=tmp_path / 'mine', num_classes=7).num_classes == 7
    assert len(blobs(tmp_path / 'mine')) == 2
    assert len(load(NAME, features_only=True)(IMAGE)) == 2
    assert 'no revision v9' in fails(load, f'{NAME}@v9') and 'no repository owner/none' in fails(
        load, 'owner/none', kind=RepoNotFoundError)


def test_load_validates_the_configuration_of_a_repository(hub, folder, tmp_path):
    to = copy(folder, tmp_path / 'copy', model_args={**TINY, 'kernel_sizes': [40001, 40001]})
    hub.add_repo('owner/hostile', files_of(to))
    for call, name in ((load, 'owner/hostile'), (create, 'hf-hub:owner/hostile')):
        assert '4095 elements' in fails(call, name)


def test_load_follows_no_path_in_place_of_a_checksum(hub, tmp_path):
    hub.fail(f'/{NAME}/resolve/*/{CONFIG}', times=None, etag=f'"{tmp_path / "evil"}"')
    assert 'does not answer as the Hub does' in fails(load, NAME) and not (tmp_path / 'evil').exists()


# --- the programs ---


@pytest.mark.slow  # 8 s: several programs
def test_a_model_of_the_hub_is_finetuned_evaluated_and_converted(hub, tmp_path, capsys):
    ten = randomize_(timm.create_model('smpconv_nano', num_classes=10, in_chans=1))
    hub.add_repo('owner/ten', files_of(save(ten, tmp_path / 'ten')))
    images = ['--dataset', 'digits', '--img-size', '16', '--workers', '0', '--batch-size', '256']
    training = ['--model', 'hf-hub:owner/ten', '--pretrained', '--epochs', '1', '--warmup-epochs', '0', *images]
    with pytest.raises(SystemExit):
        train.main([*training, '--output', str(tmp_path / 'refused')])
    assert 'takes images of 1 channels: --in-chans 1' in capsys.readouterr().err
    assert train.main([*training, '--in-chans', '1', '--output', str(tmp_path)]) == 0
    best = tmp_path / 'ten' / 'model_best.pth.tar'
    assert validate.main(['--checkpoint', str(best)]) == 0
    convert_checkpoint(best, tmp_path / 'converted')
    again = timm.create_model(f'local-dir:{tmp_path / "converted"}', pretrained=True)
    assert (again.num_classes, again.in_chans, len(again.stages)) == (10, 1, 4)
    for name in ('hf-hub:owner/ten', f'local-dir:{tmp_path / "converted"}'):
        assert validate.main(['--model', name, *images]) == 0


@pytest.mark.parametrize('name, text', [
    ('hf-hub:owner/none', 'no repository owner/none'), ('hf-hub:', 'no model is named'), ('s3:a', 'no model is named'),
    ('local-dir:none', 'config.json'), (NAME, 'hf-hub:owner/name'),
])
def test_an_unknown_model_is_one_line(hub, capsys, name, text):
    with pytest.raises(SystemExit):
        validate.main(['--model', name, '--dataset', 'digits'])
    message = capsys.readouterr().err.splitlines()[-1]
    assert text in message and 'validate.py: error: ' in message
