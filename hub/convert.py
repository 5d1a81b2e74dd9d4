#!/usr/bin/env python3
"""Makes a folder for the Hugging Face Hub of a checkpoint: model.safetensors, config.json, a model card.

    python hub/convert.py output/smpconv_t/model_best.pth.tar FOLDER
    python hub/convert.py SMPConv_T.pth.tar FOLDER --source https://github.com/sangnekim/SMPConv
    python hub/convert.py --download smpconv_t FOLDER        the original release's file, from Google Drive

Checkpoints of the original release, of timm's script and of train.py; the averaged weights where there are any. The
outputs before and after are compared. timm.create_model('local-dir:FOLDER', pretrained=True) loads the folder.

Exit codes: 0 done, 2 no such checkpoint, of no model of this package, or a folder that can't be written (nothing is
left in it), 130 interrupted.
"""
import argparse
import logging
import os
import signal
import sys
from pathlib import Path
from typing import List, Optional

from smpconv_models.utils.download import file_sha256

if __name__ == '__main__':  # Ctrl-C while PyTorch loads is no more than that
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b'convert.py: interrupted\n'), os._exit(130)))

import smpconv_models  # noqa: F401 (registers the models with timm)
from smpconv_models import hub
from smpconv_models.checkpoint import original
from smpconv_models.utils import streams

RELEASE = 'https://github.com/sangnekim/SMPConv'


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='convert.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument('checkpoint', nargs='?', metavar='CHECKPOINT', help='what to convert')
    parser.add_argument('folder', metavar='FOLDER', help='what to make; a new or an empty one')
    parser.add_argument('--download', metavar='MODEL', choices=sorted(original.GDRIVE_IDS), help='%(choices)s')
    parser.add_argument('--download-dir', metavar='DIR', help='where to (default: here)')
    parser.add_argument('--model', metavar='NAME', help='where the checkpoint does not tell')
    parser.add_argument(
        '--use-ema', action=argparse.BooleanOptionalAction, default=True, help='prefer the averaged weights')
    parser.add_argument('--source', metavar='TEXT', help="where the checkpoint is from (default: the file's name)")
    parser.add_argument('--license', metavar='NAME', default='mit', help='of the weights (default: %(default)s)')
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    logging.basicConfig(level=logging.WARNING, format='%(message)s', stream=sys.stdout, force=True)
    logging.getLogger('smpconv_models').setLevel(logging.INFO)
    parser = create_parser()
    args = parser.parse_intermixed_args(argv)
    if (args.checkpoint is None) == (args.download is None):
        parser.error('expected a CHECKPOINT or --download, one of them')
    if args.download_dir is not None and args.download is None:
        parser.error('--download-dir is of no use without --download')
    try:
        path, source = args.checkpoint, args.source
        if args.download:
            path = original.download_original(args.download, Path(args.download_dir or '.', f'{args.download}.pth.tar'))
            print(f'{path}: {path.stat().st_size} bytes, sha256 {file_sha256(path)}')
            source = source or RELEASE
        done = hub.convert(
            path, args.folder, args.model, args.use_ema, source or Path(path).name, args.license,
            Path(__file__).with_name('model_card.md').read_text())
    except (OSError, ValueError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')
    except KeyboardInterrupt:
        parser.exit(130, f'{parser.prog}: interrupted\n')
    print(f'{done.folder}: {done.architecture}, the weights under {done.key!r}, sha256 {done.sha256}')
    print(f'outputs before and after differ by {done.difference:.1e} of the largest')
    return 0


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    streams.keep_writable()
    sys.exit(main())
