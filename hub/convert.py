#!/usr/bin/env python3
"""Convert a checkpoint to a folder for the Hugging Face Hub: model.safetensors, config.json, a model card.

    python hub/convert.py output/smpconv_t/model_best.pth.tar FOLDER
    python hub/convert.py SMPConv_T.pth.tar FOLDER --source https://github.com/sangnekim/SMPConv
    python hub/convert.py --download smpconv_t FOLDER        the original release's file, from Google Drive

Checkpoints may be of the original release, of timm's script or of train.py; EMA weights are preferred. The outputs
before and after are compared. timm.create_model('local-dir:FOLDER', pretrained=True) loads the folder.

Exit codes: 0 converted, 2 wrong arguments, no checkpoint of a model of this package, or a folder that cannot be written
(nothing is left in it), 130 interrupted.
"""
import argparse
import logging
import os
import signal
import sys
from pathlib import Path
from typing import List, Optional

from smpconv_models.utils.download import file_sha256

if __name__ == '__main__':  # Ctrl-C while PyTorch is imported ends without a traceback
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b'convert.py: interrupted\n'), os._exit(130)))

import smpconv_models  # noqa: F401 (registers the models with timm)
from smpconv_models import hub
from smpconv_models.checkpoint import original
from smpconv_models.utils import streams


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='convert.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument('checkpoint', nargs='?', metavar='CHECKPOINT', help='checkpoint file')
    parser.add_argument('folder', metavar='FOLDER', help='new or empty folder')
    parser.add_argument(
        '--download', metavar='MODEL', choices=sorted(original.GDRIVE_IDS),
        help="convert the original release's file of %(choices)s")
    parser.add_argument('--download-dir', metavar='DIR', help='folder for the download (default: the current one)')
    parser.add_argument('--model', metavar='NAME', help='model, if the checkpoint does not name it')
    parser.add_argument(
        '--use-ema', action=argparse.BooleanOptionalAction,
        help='use the EMA weights, or not (default: the better of both if recorded in the checkpoint, otherwise EMA)')
    parser.add_argument('--source', metavar='TEXT', help="origin of the checkpoint (default: the file's name)")
    parser.add_argument(
        '--license', metavar='NAME',
        help="license of the weights (default: mit with the original release as --source, otherwise unknown)")
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    logging.basicConfig(level=logging.WARNING, format='%(message)s', stream=sys.stdout, force=True)
    logging.getLogger('smpconv_models').setLevel(logging.INFO)
    parser = create_parser()
    args = parser.parse_intermixed_args(argv)
    if (args.checkpoint is None) == (args.download is None):
        parser.error('expected either CHECKPOINT or --download')
    if args.download_dir is not None and args.download is None:
        parser.error('--download-dir has no effect without --download')
    try:
        path, source = args.checkpoint, args.source
        if args.download:
            path = original.download_original(args.download, Path(args.download_dir or '.', f'{args.download}.pth.tar'))
            print(f'{path}: {path.stat().st_size} bytes, sha256 {file_sha256(path)}')
            source = source or original.RELEASE_URL
        done = hub.convert(
            path, args.folder, args.model, args.use_ema, source or Path(path).name, args.license,
            Path(__file__).with_name('model_card.md').read_text())
    except (OSError, ValueError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')
    except KeyboardInterrupt:
        parser.exit(130, f'{parser.prog}: interrupted\n')
    print(f'{done.folder}: {done.architecture}, the weights under {done.key!r}, sha256 {done.sha256}')
    print(f'outputs before and after differ by {done.difference:.1e} of the largest output')
    return 0


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    streams.keep_writable()
    sys.exit(main())
