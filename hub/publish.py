#!/usr/bin/env python3
"""Creates or updates a repository of the Hugging Face Hub with a folder that hub/convert.py has made.

    python hub/publish.py FOLDER OWNER/NAME              says what it would do
    python hub/publish.py FOLDER OWNER/NAME --publish    does it

The token is the Hub client's: of HF_TOKEN, or of `hf auth login`. It is never taken as an argument, and never shown.

Exit codes: 0 done, or nothing to do, 2 a folder, a name or a token that won't do, or the Hub refuses, 130 interrupted.
"""
import argparse
import os
import signal
import sys
from typing import List, Optional

if __name__ == '__main__':  # Ctrl-C while PyTorch loads is no more than that
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b'publish.py: interrupted\n'), os._exit(130)))

import smpconv_models  # noqa: F401 (registers the models with timm)
from smpconv_models import hub
from smpconv_models.utils import streams


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='publish.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument('folder', metavar='FOLDER', help='what to send')
    parser.add_argument('repo', metavar='OWNER/NAME', help='where to')
    parser.add_argument('--publish', action='store_true', help='do it')
    parser.add_argument('--force', action='store_true', help='replace other weights that are there')
    parser.add_argument('--private', action='store_true', help='make the repository so; one that is there must be')
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    parser = create_parser()
    args = parser.parse_intermixed_args(argv)
    try:
        done = hub.publish(args.folder, args.repo, not args.publish, args.force, args.private)
    except (OSError, ValueError) as error:
        after_bar = '\n' if args.publish else ''
        parser.exit(2, f'{after_bar}{parser.prog}: error: {error}\n')
    except KeyboardInterrupt:
        parser.exit(130, f'{parser.prog}: interrupted\n')
    if done.creates:
        print(f'{done.repo}: a new repository')
    for name, change in done.changes.items():
        print(f'{change:8} {name}')
    if done.url:
        print(f'published: {done.url}')
    elif all(change == 'same' for change in done.changes.values()):
        print(f'{done.repo} is up to date')
    else:
        print('nothing was sent; --publish does it')
    return 0


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    streams.keep_writable()
    sys.exit(main())
