"""A Hugging Face Hub on loopback, inside the test's process, for the real client of huggingface_hub.

    with LoopbackHub(token='hf_test') as hub:
        hub.add_repo('owner/name', {'config.json': b'{}', 'model.safetensors': path_or_bytes})
        hub.fail('*/model.safetensors', drop='close', at=1000)
        hf_hub_download('owner/name', 'model.safetensors', endpoint=hub.url, cache_dir=folder)
        subprocess.run(command, env=hub.environment(home, HF_TOKEN=hub.token))
        assert [str(request) for request in hub.requests] == ['HEAD /owner/name/resolve/main/model.safetensors', ...]

It supports what models need: file metadata and contents, listings, branches and tags, repositories and commits, LFS's
batch interface; not datasets or spaces, pull requests, uploads in parts, or listings on several pages. Contents of
LFS files come from a second port, `hub.cdn_url`, as the Hub's come from another host: the address under /resolve/ only
leads there, and the client must not take its token along.

Xet is never offered. A client that has hf_xet installed downloads without it then, but insists on it for uploads,
regardless of the server: HF_HUB_DISABLE_XET=1, in `hub.environment`, makes it upload by LFS. The variable is read when
huggingface_hub is imported; in a process that has done so, set huggingface_hub.constants.HF_HUB_DISABLE_XET.
"""
import base64
import contextlib
import fnmatch
import hashlib
import json
import os
import re
import socket
import struct
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote

from huggingface_hub import constants

PIECE = 1 << 18
LFS_SUFFIXES = ('.safetensors', '.bin', '.pt', '.pth', '.ckpt', '.npz', '.onnx')
LFS_SIZE = 10_000_000
HTML = b'<!DOCTYPE html>\n<html><head><title>Sign in to this network</title></head><body>Sign in</body></html>\n'
RESET = struct.pack('ii', 1, 0)  # SO_LINGER of no time: close() sends a reset


@dataclass
class Request:
    """What a client asked: the path without its query and unquoted, the headers with their names in lower case."""
    method: str
    path: str
    query: str
    headers: dict
    server: str  # 'hub' or 'cdn'
    status: int | None = None  # of the answer; None where the connection was dropped instead

    def __str__(self):
        return f'{self.method} {self.path}'


@dataclass
class Fault:
    """What goes wrong in the answers to requests whose path matches a shell pattern.

    Any of the kinds may be given together. Those of the body (`at`, `flip`, `resize`) leave HEAD requests alone.
    `seen` counts the requests that met the fault.
    """
    pattern: str
    times: int | None = 1  # this many requests; None: always
    method: str | None = None  # only requests of this method
    hang: float = 0.  # seconds of silence, before the answer or at byte `at` of its body
    drop: str | None = None  # the connection ends, instead of an answer or at byte `at` of its body: 'close', 'reset'
    at: int | None = None
    status: int | None = None  # an answer of this status; nothing that was asked for is done
    body: bytes | None = None  # this answer (with status 200 unless told), say HTML
    headers: dict = field(default_factory=dict)  # set in the answer; None removes one
    etag: str | None = None  # instead of the file's, quotes included
    flip: int | None = None  # byte of the file whose lowest bit is flipped
    resize: int = 0  # the body is this much longer (by zeros) or, if negative, shorter, and Content-Length says so
    seen: int = 0

    def __post_init__(self):
        assert self.drop in (None, 'close', 'reset')
        assert self.at is None or self.drop or self.hang, 'what happens at this byte?'

    def matches(self, request):
        of_body = self.at is not None or self.flip is not None or self.resize
        return ((self.times is None or self.seen < self.times) and fnmatch.fnmatchcase(request.path, self.pattern)
                and self.method in (None, request.method) and not (of_body and request.method == 'HEAD'))

    def answer(self):
        """The answer without asking the Hub, or None."""
        if self.body is not None:
            return Answer(self.status or 200, {'Content-Type': 'text/html; charset=utf-8'}, Content(self.body))
        if self.status is not None:
            return _json({'error': HTTPStatus(self.status).phrase}, self.status)
        return None

    def spoil(self, answer):
        """The answer's headers and body as this fault has them."""
        if self.etag is not None:
            answer.headers['ETag'] = self.etag
            if 'X-Linked-Etag' in answer.headers:
                answer.headers['X-Linked-Etag'] = self.etag
        answer.headers.update(self.headers)
        answer.content.flip = self.flip
        answer.content.resize(self.resize)


NO_FAULT = Fault('', times=0)


class Content:
    """Bytes of a file or of memory, from `start` on, in pieces that need little memory."""
    def __init__(self, source, start=0):
        self.source, self.start = source, start
        self.stop = len(source) if isinstance(source, bytes) else os.path.getsize(source)
        self.zeros, self.flip = 0, None

    def __len__(self):
        return self.stop - self.start + self.zeros

    def resize(self, change):
        self.zeros = max(change, 0)
        self.stop = max(self.stop + min(change, 0), self.start)

    def __iter__(self):
        position = self.start
        for piece in self._stored():
            if self.flip is not None and position <= self.flip < position + len(piece):
                piece = bytearray(piece)
                piece[self.flip - position] ^= 1
            yield piece
            position += len(piece)
        yield bytes(self.zeros)

    def _stored(self):
        if isinstance(self.source, bytes):
            yield self.source[self.start:self.stop]
            return
        with open(self.source, 'rb') as file:
            file.seek(self.start)
            for position in range(self.start, self.stop, PIECE):
                yield file.read(min(PIECE, self.stop - position))


@dataclass
class Answer:
    status: int
    headers: dict = field(default_factory=dict)
    content: Content = field(default_factory=lambda: Content(b''))


def _json(value, status=200, **headers):
    return Answer(status, {'Content-Type': 'application/json; charset=utf-8', **headers},
                  Content(json.dumps(value).encode()))


class Refusal(Exception):
    """An error in the Hub's form: the client reads its kind from X-Error-Code."""
    def __init__(self, status, message, code=None, **headers):
        super().__init__(message)
        headers = {'X-Error-Code': code, 'X-Error-Message': message, **headers}
        self.answer = _json({'error': message}, status, **headers)


@dataclass(frozen=True)
class Blob:
    """A file's content, at `path` on this disk."""
    path: Path
    size: int
    sha256: str
    lfs: bool

    @property
    def pointer(self):
        """What git holds in place of an LFS file."""
        return f'version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n'.encode()

    @property
    def git_oid(self):
        data = self.pointer if self.lfs else self.path.read_bytes()
        return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()

    @property
    def etag(self):
        return self.sha256 if self.lfs else self.git_oid

    def sibling(self, path, details):
        """As the model's information lists it."""
        if not details:
            return {'rfilename': path}
        lfs = {'lfs': {'sha256': self.sha256, 'size': self.size, 'pointerSize': len(self.pointer)}} if self.lfs else {}
        return {'rfilename': path, 'size': self.size, 'blobId': self.git_oid, **lfs}


def _is_lfs(path, size):
    """The Hub decides by .gitattributes and size; a file without bytes cannot be LFS."""
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size >= LFS_SIZE)


class Store:
    """Contents by sha256: uploaded ones in a folder of its own, files of the test where they lie."""
    def __init__(self, folder):
        self.folder = Path(folder)
        self.paths = {}  # sha256: path

    def write(self, pieces):
        """Take in the pieces; gives sha256 and size."""
        digest, size = hashlib.sha256(), 0
        handle, name = tempfile.mkstemp(dir=self.folder)
        with open(handle, 'wb') as file:
            for piece in pieces:
                digest.update(piece)
                size += file.write(piece)
        path = self.folder / digest.hexdigest()
        os.replace(name, path)
        self.paths[digest.hexdigest()] = path
        return digest.hexdigest(), size

    def adopt(self, path):
        """A file of the test's, which must not change afterwards."""
        digest, content = hashlib.sha256(), Content(path)
        for piece in content:
            digest.update(piece)
        self.paths.setdefault(digest.hexdigest(), Path(path))
        return digest.hexdigest(), len(content)

    def blob(self, sha256, lfs):
        return Blob(self.paths[sha256], self.paths[sha256].stat().st_size, sha256, lfs)

    def put(self, path, content):
        """The blob of a file in a repository, from bytes or a file of the test's."""
        sha256, size = self.write([content]) if isinstance(content, bytes) else self.adopt(content)
        return self.blob(sha256, _is_lfs(path, size))


class Repo:
    """Commits, each a whole {path: Blob}, and the names of some."""
    def __init__(self, name, private=False, gated=False):
        self.name, self.private, self.gated = name, private, gated
        self.commits, self.branches, self.tags = {}, {}, {}
        self.commit({}, 'main')

    def commit(self, files, branch):
        parent = self.branches.get(branch, '')
        text = json.dumps([self.name, branch, parent, len(self.commits), {k: files[k].sha256 for k in sorted(files)}])
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid], self.branches[branch] = dict(sorted(files.items())), oid
        return oid

    def resolve(self, revision):
        """A commit's id from a branch, a tag or itself."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise Refusal(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return oid


class _Server(ThreadingHTTPServer):
    """Its threads end with server_close(), those of open connections included."""
    daemon_threads = False  # the others are not waited for
    request_queue_size = 64

    def __init__(self, hub, name):
        super().__init__(('127.0.0.1', 0), _Handler)
        self.hub, self.name, self.connections = hub, name, set()
        self.url = f'http://127.0.0.1:{self.server_port}'
        self.loop = threading.Thread(target=self.serve_forever, args=(0.02,), name=f'loopback-{name}', daemon=True)

    def process_request(self, request, client_address):
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.connections.discard(request)
        if request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, len(RESET)) == RESET:
            self.close_request(request)  # no orderly end before
        else:
            super().shutdown_request(request)

    def handle_error(self, request, client_address):
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):  # that is a client gone, or the hub closing
            self.hub.errors.append(error)

    def close(self):
        self.shutdown()
        self.loop.join()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):  # gone already
                connection.shutdown(socket.SHUT_RDWR)  # ends the wait for a next request
        self.server_close()


REPO, REVISION, OID = r'(?P<repo>[^/]+/[^/]+)', r'(?P<revision>[^/]+)', r'(?P<oid>[0-9a-f]{64})'
ROUTES = [(method, re.compile(path), name) for method, path, name in [
    ('GET', f'/{REPO}/resolve/{REVISION}/(?P<path>.+)', 'file'),
    ('GET', f'/cdn/{REPO}/{OID}/.+', 'lfs_file'),
    ('GET', '/api/whoami-v2', 'whoami'),
    ('GET', f'/api/models/{REPO}(/revision/{REVISION})?', 'info'),
    ('POST', '/api/repos/create', 'create'),
    ('POST', '/api/validate-yaml', 'validate_yaml'),
    ('POST', f'/api/models/{REPO}/preupload/{REVISION}', 'preupload'),
    ('POST', f'/{REPO}[.]git/info/lfs/objects/batch', 'batch'),
    ('PUT', f'/upload/{OID}', 'upload'),
    ('POST', f'/{REPO}[.]git/info/lfs/objects/verify', 'verify'),
    ('POST', f'/api/models/{REPO}/commit/{REVISION}', 'commit'),
]]


class _Handler(BaseHTTPRequestHandler):
    """One connection. Methods named in ROUTES give an Answer or raise a Refusal."""
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True  # headers and body are written apart, and the second would wait

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.hub, (path, _, query) = self.server.hub, self.path.partition('?')
        headers = {key.lower(): value for key, value in self.headers.items()}
        self.asked = Request(self.command, unquote(path), query, headers, self.server.name)
        self.unread = int(headers.get('content-length', 0))
        fault = self.hub._meet(self.asked)
        if fault.hang and fault.at is None:
            self.hub.closing.wait(fault.hang)
        if fault.drop and fault.at is None:
            return self._drop(fault)
        answer = fault.answer() or self._ask(path)
        for _ in self._pieces():
            pass  # what was not read would be taken for the next request
        fault.spoil(answer)
        self._send(answer, fault)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _ask(self, path):
        """The answer of the route to this path, still quoted."""
        try:
            for method, pattern, name in ROUTES:
                match = pattern.fullmatch(path)
                if match and method == self.command.replace('HEAD', 'GET'):
                    return getattr(self, name)(**{k: v and unquote(v) for k, v in match.groupdict().items()})
            raise Refusal(404, 'Sorry, we can\'t find the page you are looking for.')
        except Refusal as refusal:
            return refusal.answer

    def _send(self, answer, fault):
        self.asked.status = answer.status
        self.send_response(answer.status)
        for key, value in {'Content-Length': len(answer.content), **answer.headers}.items():
            if value is not None:
                self.send_header(key, str(value))
        self.end_headers()
        sent, at = 0, fault.at
        for piece in answer.content if self.command != 'HEAD' else ():
            if at is not None and sent + len(piece) > at:
                self.wfile.write(piece[:at - sent])
                self.hub.closing.wait(fault.hang)
                if fault.drop:
                    return self._drop(fault)
                piece, at = piece[at - sent:], None
            self.wfile.write(piece)
            sent += len(piece)

    def _drop(self, fault):
        self.close_connection = True
        if fault.drop == 'reset':
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    def _pieces(self):
        """The request's body."""
        while self.unread:
            piece = self.rfile.read(min(PIECE, self.unread))
            if not piece:
                raise ConnectionError('the client went away within its request')
            self.unread -= len(piece)
            yield piece

    def _body(self):
        return b''.join(self._pieces())

    # -- who asks, and for what

    def _role(self):
        """'write', 'read' or None for nobody."""
        token = self.asked.headers.get('authorization')
        roles = {f'Bearer {self.hub.token}': 'write', f'Bearer {self.hub.read_token}': 'read', None: None}
        if token not in roles:
            raise Refusal(401, 'Invalid credentials in Authorization header')
        return roles[token]

    def _must_write(self):
        role = self._role()
        if role is None:
            raise Refusal(401, 'Invalid username or password.')
        if role != 'write':
            raise Refusal(403, 'Forbidden: you must use a write token to upload to a repository.')

    def _repo(self, name, files=False):
        """The repository, if it may be seen and, with `files`, its files may be read."""
        repo, role = self.hub.repos.get(name), self._role()
        if role is None and (repo is None or repo.private):  # who is nobody does not learn which
            raise Refusal(401, 'Invalid username or password.', 'RepoNotFound')
        if repo is None:
            raise Refusal(404, 'Repository not found', 'RepoNotFound')
        if repo.gated and files:
            message = f'Access to model {name} is restricted and you are not in the authorized list.'
            raise Refusal(401 if role is None else 403, message, 'GatedRepo')
        return repo

    # -- reading

    def file(self, repo, revision, path):
        name, repo = repo, self._repo(repo, files=True)
        commit = repo.resolve(revision)
        blob = repo.commits[commit].get(path)
        if blob is None:
            raise Refusal(404, 'Entry not found', 'EntryNotFound', **{'X-Repo-Commit': commit})
        if not blob.lfs:
            return self._content(blob, {'X-Repo-Commit': commit, 'Content-Type': 'text/plain; charset=utf-8'})
        target = f'{self.hub.cdn_url}/cdn/{name}/{blob.sha256}/{quote(path)}'
        headers = {'Location': target, 'X-Repo-Commit': commit, 'X-Linked-Size': blob.size,
                   'X-Linked-Etag': f'"{blob.etag}"', 'ETag': f'"{blob.git_oid}"', 'Accept-Ranges': 'bytes'}
        return Answer(302, headers, Content(f'Found. Redirecting to {target}'.encode()))

    def lfs_file(self, repo, oid):
        if oid not in self.hub.store.paths:
            raise Refusal(404, 'No such object')
        return self._content(self.hub.store.blob(oid, lfs=True), {'Content-Type': 'application/octet-stream'})

    def _content(self, blob, headers):
        """All of a file, or the rest from the byte that was asked for."""
        headers = {'ETag': f'"{blob.etag}"', 'Accept-Ranges': 'bytes', **headers}
        match = re.fullmatch(r'bytes=(\d+)-', self.asked.headers.get('range', ''))
        if not match:
            return Answer(200, headers, Content(blob.path))
        start = int(match[1])
        if start >= blob.size:
            raise Refusal(416, 'Requested range not satisfiable', **{'Content-Range': f'bytes */{blob.size}'})
        headers['Content-Range'] = f'bytes {start}-{blob.size - 1}/{blob.size}'
        return Answer(206, headers, Content(blob.path, start))

    def whoami(self):
        if self._role() is None:
            raise Refusal(401, 'Invalid username or password.')
        auth = {'type': 'access_token', 'accessToken': {'displayName': 'test', 'role': self._role()}}
        return _json({'type': 'user', 'id': '0', 'name': self.hub.user, 'fullname': 'A Test', 'orgs': [], 'auth': auth})

    def info(self, repo, revision):
        repo = self._repo(repo)
        commit = repo.resolve(revision or 'main')
        details = 'blobs' in parse_qs(self.asked.query)
        siblings = [blob.sibling(path, details) for path, blob in repo.commits[commit].items()]
        return _json({
            '_id': '0', 'id': repo.name, 'modelId': repo.name, 'author': repo.name.split('/')[0], 'sha': commit,
            'private': repo.private, 'gated': 'manual' if repo.gated else False, 'disabled': False, 'tags': [],
            'createdAt': '2024-01-01T00:00:00.000Z', 'lastModified': '2024-01-01T00:00:00.000Z', 'downloads': 0,
            'likes': 0, 'siblings': siblings,
        })

    # -- writing

    def create(self):
        self._must_write()
        asked = json.loads(self._body())
        name = f'{asked.get("organization") or self.hub.user}/{asked["name"]}'
        told = {'url': f'{self.hub.url}/{name}', 'name': name, 'id': name}
        private = asked.get('private') or asked.get('visibility') == 'private'
        with self.hub.lock:
            if name in self.hub.repos:
                return _json({'error': 'You already created this model repo', **told}, 409)
            self.hub.repos[name] = Repo(name, private=bool(private))
        return _json(told)

    def validate_yaml(self):
        return _json({'errors': [], 'warnings': []})

    def preupload(self, repo, revision):
        self._must_write()
        files = (repo := self._repo(repo)).commits[repo.resolve(revision)]
        modes = []
        for file in json.loads(self._body())['files']:
            known = {'oid': files[file['path']].etag} if file['path'] in files else {}
            mode = 'lfs' if _is_lfs(file['path'], file['size']) else 'regular'
            modes.append({'path': file['path'], 'uploadMode': mode, 'shouldIgnore': False, **known})
        return _json({'files': modes})

    def batch(self, repo):
        self._must_write()
        self._repo(repo)
        objects = [{'oid': asked['oid'], 'size': asked['size']} for asked in json.loads(self._body())['objects']]
        for known in objects:
            if known['oid'] not in self.hub.store.paths:
                self.hub.expected.add(known['oid'])
                known['actions'] = {'upload': {'href': f'{self.hub.cdn_url}/upload/{known["oid"]}'},
                                    'verify': {'href': f'{self.hub.url}/{repo}.git/info/lfs/objects/verify'}}
        return _json({'transfer': 'basic', 'objects': objects})

    def upload(self, oid):
        """A storage's, which knows no tokens: the address, once given, is the permission."""
        if oid not in self.hub.expected:
            raise Refusal(403, 'Access denied')
        if 'content-length' not in self.asked.headers:
            raise Refusal(411, 'You must provide the Content-Length HTTP header.')
        if self.hub.store.write(self._pieces())[0] != oid:
            raise Refusal(400, 'The content does not have the sha256 that was announced')
        return Answer(200, {'ETag': f'"{oid}"'})

    def verify(self, repo):
        self._must_write()
        asked, paths = json.loads(self._body()), self.hub.store.paths
        if asked['oid'] not in paths or paths[asked['oid']].stat().st_size != asked['size']:
            raise Refusal(404, 'No such object')
        return _json({})

    def commit(self, repo, revision):
        self._must_write()
        repo, (head, *operations) = self._repo(repo), map(json.loads, self._body().splitlines())
        if revision not in repo.branches:
            raise Refusal(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        with self.hub.lock:
            parent = repo.branches[revision]
            if not parent.startswith(head['value'].get('parentCommit', '')):
                raise Refusal(412, 'A commit has happened since. Please refresh and try again.')
            files = dict(repo.commits[parent])
            for operation in operations:
                self._apply(files, operation['key'], operation['value'])
            oid = repo.commit(files, revision)
        url = f'{self.hub.url}/{repo.name}/commit/{oid}'
        return _json({'success': True, 'commitOid': oid, 'commitUrl': url, 'hookOutput': ''})

    def _apply(self, files, key, value):
        store, path = self.hub.store, value['path']
        if key == 'file':
            files[path] = store.blob(store.write([base64.b64decode(value['content'])])[0], lfs=False)
        elif key == 'lfsFile' and value['oid'] not in store.paths:
            raise Refusal(400, f'LFS pointer pointed to a file that does not exist: {path}')
        elif key == 'lfsFile':
            files[path] = store.blob(value['oid'], lfs=True)
        elif key == 'deletedFile' and path not in files:
            raise Refusal(404, "A file with this name doesn't exist", 'EntryNotFound')
        elif key == 'deletedFile':
            del files[path]
        else:
            raise Refusal(400, f'Unknown operation {key}')


class LoopbackHub:
    """The Hub; a context manager, whose threads and uploaded files end with it.

    Args:
        token: may do everything.
        read_token: may read, but not write.
        user: whom the tokens belong to.

    Raises:
        RuntimeError: at the context's end, if the Hub itself failed, so that this does not pass for a fault.
    """
    def __init__(self, token='hf_test', read_token='hf_read', user='tester'):
        self.token, self.read_token, self.user = token, read_token, user
        self.repos, self.requests, self.faults, self.errors = {}, [], [], []
        self.expected = set()  # sha256 of the uploads that were agreed on
        self.lock, self.closing = threading.RLock(), threading.Event()

    def __enter__(self):
        self._folder = tempfile.TemporaryDirectory(prefix='loopback-hub-')
        self.store = Store(self._folder.name)
        self._servers = _Server(self, 'hub'), _Server(self, 'cdn')
        self.url, self.cdn_url = (server.url for server in self._servers)
        for server in self._servers:
            server.loop.start()
        return self

    def __exit__(self, *exception):
        self.closing.set()
        for server in self._servers:
            server.close()
        self._folder.cleanup()
        if self.errors:
            raise RuntimeError('the loopback Hub failed') from self.errors[0]

    def environment(self, home, **variables):
        """Environment for a process of the client, its cache and token under the folder `home`.

        HF_HUB_DISABLE_XET: see the module. HF_HUB_DISABLE_TELEMETRY: the client would ask for a list of coding agents.
        """
        ours = {key: value for key, value in os.environ.items()
                if not key.startswith(('HF_', 'HUGGING', 'TRANSFORMERS_'))}
        return {**ours, 'HF_ENDPOINT': self.url, 'HF_HOME': str(home), 'HF_HUB_DISABLE_XET': '1',
                'HF_HUB_DISABLE_TELEMETRY': '1', 'NO_PROXY': '127.0.0.1', 'no_proxy': '127.0.0.1', **variables}

    def add_repo(self, name, files=None, private=False, gated=False):
        """A repository with these files, bytes or paths of files that must not change; gives the commit's id.

        Nobody has been granted the files of a gated one.
        """
        self.repos[name] = Repo(name, private, gated)
        return self.commit(name, files) if files else self.repos[name].branches['main']

    def commit(self, name, files, branch='main'):
        """Add or change files, or delete those given as None; a branch that is new begins at main."""
        repo = self.repos[name]
        with self.lock:
            after = dict(repo.commits[repo.branches.get(branch, repo.branches['main'])])
            after.update({path: content if content is None else self.store.put(path, content)
                          for path, content in files.items()})
            return repo.commit({path: blob for path, blob in after.items() if blob is not None}, branch)

    def files(self, name, revision='main'):
        """{path: the file on this disk that has the content}."""
        repo = self.repos[name]
        return {path: blob.path for path, blob in repo.commits[repo.resolve(revision)].items()}

    def fail(self, pattern, **what):
        """Misbehave, see Fault. Of several that match, the one told first and not used up is met."""
        self.faults.append(Fault(pattern, **what))
        return self.faults[-1]

    def asked(self, pattern='*', method=None):
        """The requests so far whose path matches."""
        return [request for request in list(self.requests)
                if fnmatch.fnmatchcase(request.path, pattern) and method in (None, request.method)]

    def forget(self):
        """Neither requests nor faults so far."""
        self.requests.clear()
        self.faults.clear()

    def _meet(self, request):
        """Record a request; gives the fault that it meets."""
        with self.lock:
            self.requests.append(request)
            fault = next((fault for fault in self.faults if fault.matches(request)), NO_FAULT)
            fault.seen += fault is not NO_FAULT
            return fault


def set_client(monkeypatch, folder, url=None):
    """Set up huggingface_hub in this process: no Xet, no telemetry, no token; cache in a folder of the test's."""
    settings = dict(
        HF_HUB_DISABLE_XET=True, HF_HUB_DISABLE_TELEMETRY=True, HF_HUB_OFFLINE=False,
        HF_HUB_CACHE=str(folder / 'cache'), HF_TOKEN_PATH=str(folder / 'token'))
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    for name in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN'):
        monkeypatch.delenv(name, raising=False)
    if url is not None:
        point_client(monkeypatch, url)


def point_client(monkeypatch, url):
    """Let huggingface_hub in this process ask the Hub at this address."""
    monkeypatch.setattr(constants, 'ENDPOINT', url)
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', url + '/{repo_id}/resolve/{revision}/{filename}')
