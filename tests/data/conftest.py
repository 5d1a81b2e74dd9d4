"""Fixtures for sequences."""
import functools
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import made_sequences as made
import pytest

from smpconv_models.data import speech


@pytest.fixture(autouse=True)
def clips_that_were_made(monkeypatch):
    """Expect the counts of the generated clips in place of the published ones."""
    monkeypatch.setattr(speech, 'CLIPS', {split: 10 * each for split, each in made.EACH.items()})


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope='session')
def server(tmp_path_factory):
    """Serve a folder on this machine; return the folder and its address. torchvision accepts no file:// address."""
    folder = tmp_path_factory.mktemp('served')
    with ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(folder))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv('no_proxy', '127.0.0.1')
            yield folder, f'http://127.0.0.1:{http.server_port}'
        http.shutdown()
