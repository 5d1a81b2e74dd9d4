"""Fixtures for tests of data sets."""
import functools
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import made_sequences as made
import pytest

from smpconv_models.data import images, speech


@pytest.fixture(autouse=True)
def made_files_count_as_published(monkeypatch):
    """Replace the numbers of published clips and the checksums of published images by those of the made files."""
    monkeypatch.setattr(speech, 'CLIPS', {split: 10 * each for split, each in made.EACH.items()})
    monkeypatch.setattr(images, 'MNIST_MD5', made.mnist_md5())


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope='session')
def server(tmp_path_factory):
    """Serve a new folder on this machine, as torchvision accepts no file:// address; return both."""
    folder = tmp_path_factory.mktemp('served')
    with ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(folder))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv('no_proxy', '127.0.0.1')
            yield folder, f'http://127.0.0.1:{http.server_port}'
        http.shutdown()
