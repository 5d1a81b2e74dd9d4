"""Serve a page on this machine that classifies images: `python -m smpconv_models.demo --checkpoint RUN`.

Drop an image on the page, paste or choose one: it shows the most probable classes, the image under its Grad-CAM heat
map, and kernels of the network with their points. The page loads nothing from elsewhere, and only users of this
machine can open it. Ctrl-C ends the server. Needs smpconv_models[figures].

Exit codes: 0 ended by Ctrl-C, 2 wrong arguments or checkpoint.
"""
import argparse
import base64
import json
import logging
import re
import signal
import sys
import tempfile
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
from PIL import Image

import smpconv_models  # noqa: F401 (registers the models with timm)
from smpconv_models import figures
from smpconv_models.layers import smp_layers
from smpconv_models.prediction import Predictor
from smpconv_models.prediction.inputs import ModelSource
from smpconv_models.prediction.predictor import PredictOptions
from smpconv_models.training import DeviceOptions, ModelOptions, cli
from smpconv_models.utils import streams
from smpconv_models.utils.errors import first_line

_PAGE = Path(__file__).parent / 'demo.html'
_MAX_BYTES = 64 << 20  # of an image file
# The page's own style and script are inline; whatever else a browser could fetch is refused.
_POLICY = "default-src 'none'; img-src 'self' blob: data:; connect-src 'self'; style-src 'unsafe-inline'; " \
    "script-src 'unsafe-inline'"


class DemoServer(ThreadingHTTPServer):
    """Server of the page, on a loopback address.

    Args:
        predictor: Classifier.
        port: Port, 0 for any free one.

    Raises:
        ImportError: If the grad-cam package is not installed.
        OSError: If the port cannot be used.
    """
    daemon_threads = True

    def __init__(self, predictor: Predictor, port: int = 0) -> None:
        self.predictor = predictor
        self.kernels = _draw_kernels(predictor.model)
        self.lock = threading.Lock()  # one prediction at a time
        list(predictor.predict([np.zeros((8, 8), np.uint8)], heat_maps=True))  # what cannot work fails before the start
        super().__init__(('127.0.0.1', port), _Handler)

    @property
    def url(self) -> str:
        """Address of the page."""
        return f'http://127.0.0.1:{self.server_port}/'

    def predict(self, content: bytes) -> Dict[str, Any]:
        """Return the classes and the heat map of an image file, as plain data."""
        with self.lock:
            prediction, = self.predictor.predict([BytesIO(content)], heat_maps=True)
        result = prediction.as_dict()
        if prediction.heat_map is not None:
            result['heat_map'] = _data_url(prediction.heat_map)
        return result


    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report an error, unless the browser has closed the connection."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: DemoServer

    def do_GET(self) -> None:
        if self.path == '/':
            self._send(_PAGE.read_bytes(), 'text/html; charset=utf-8')
        elif self.path == '/model':
            label = self.server.predictor.label
            self._send_json(
                {'label': label, 'has_kernels': self.server.kernels is not None, 'max_bytes': _MAX_BYTES})
        elif self.path == '/kernels.png' and self.server.kernels is not None:
            self._send(self.server.kernels, 'image/png')
        else:
            self._refuse(HTTPStatus.NOT_FOUND, f'there is no page {self.path}')

    def do_POST(self) -> None:
        length = self.headers.get('Content-Length', '')
        if self.path != '/predict':
            self._refuse(HTTPStatus.NOT_FOUND, f'there is no page {self.path}')
        elif not re.fullmatch('[0-9]{1,15}', length):
            self._refuse(HTTPStatus.LENGTH_REQUIRED, 'expected the header Content-Length')
        elif int(length) > _MAX_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f'expected an image of up to {_MAX_BYTES >> 20} MiB')
        else:
            try:
                self._send_json(self.server.predict(self.rfile.read(int(length))))
            except (MemoryError, RuntimeError, ValueError) as error:
                self._refuse(HTTPStatus.UNPROCESSABLE_ENTITY, first_line(error))

    def parse_request(self) -> bool:
        """Read a request; refuse requests from other sites, which a browser may send here."""
        if not super().parse_request():
            return False
        port = '' if self.server.server_port == 80 else f':{self.server.server_port}'
        own = [f'{name}{port}' for name in ('127.0.0.1', 'localhost')]
        origin = self.headers.get('Origin')
        if self.headers.get('Host') in own and origin in (None, *(f'http://{name}' for name in own)):
            return True
        self._refuse(HTTPStatus.FORBIDDEN, f'open {self.server.url}')
        return False

    def _send_json(self, value: Any) -> None:
        self._send(json.dumps(value).encode(), 'application/json')

    def _send(self, content: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        for name, value in (
                ('Content-Type', kind), ('Content-Length', str(len(content))), ('Content-Security-Policy', _POLICY),
                ('X-Content-Type-Options', 'nosniff'), ('Cache-Control', 'no-store')):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self._send(json.dumps({'error': reason}).encode(), 'application/json', status)

    def log_message(self, format: str, *args: Any) -> None:
        """Log no requests."""


def _data_url(image: Image.Image) -> str:
    content = BytesIO()
    image.save(content, format='png')
    return f'data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}'


def _draw_kernels(model: Any) -> Optional[bytes]:
    """Return a PNG file of kernels and their points, None for a network without points."""
    if not smp_layers(model):
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'kernels.png'
        figures.save_kernels(path, model, None, 4, 5)
        return path.read_bytes()


def create_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog='python -m smpconv_models.demo', description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--checkpoint', required=True, metavar='PATH',
        help="checkpoint, run's folder, converted folder, hf-hub:OWNER/NAME or local-dir:FOLDER")
    parser.add_argument(
        '--port', type=cli.bounded_number(int, 0, 65535), default=8000, metavar='N',
        help='port, 0 for any free one (default: %(default)s)')
    parser.add_argument('--device', metavar='NAME', help='device (default: cuda if there is a GPU, otherwise cpu)')
    parser.add_argument(
        '--img-size', type=cli.positive_int, metavar='N', help="image side in pixels (default: the checkpoint's)")
    cli.add_options(parser, ModelOptions)
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    logging.basicConfig(level=logging.WARNING, format='%(message)s')
    parser = create_parser()
    args = parser.parse_args(argv)
    try:
        source = ModelSource(cli.read_options(args, ModelOptions), [args.checkpoint], img_size=args.img_size)
        loaded, = source.load()
        predictor = Predictor(loaded, PredictOptions(img_size=args.img_size), DeviceOptions(device=args.device))
        with _bind(predictor, args.port) as server:
            sys.stdout.write(f'open {server.url} in a browser; Ctrl-C ends the server\n')
            sys.stdout.flush()
            server.serve_forever()
    except (ImportError, OSError, ValueError) as error:
        parser.error(first_line(error))
    except KeyboardInterrupt:
        pass
    return 0


def _bind(predictor: Predictor, port: int) -> DemoServer:
    try:
        return DemoServer(predictor, port)
    except OSError as error:
        raise ValueError(f'port {port} cannot be used: {error.strerror}; --port 0 takes a free one') from error


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    streams.keep_writable()
    sys.exit(main())
