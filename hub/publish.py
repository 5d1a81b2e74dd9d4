#!/usr/bin/env python3
"""Create or update a repository of the Hugging Face Hub with a folder of hub/convert.py.

    python hub/publish.py FOLDER OWNER/NAME              prints the changes
    python hub/publish.py FOLDER OWNER/NAME --publish    makes them

The token is the Hub client's: HF_TOKEN, or that of `hf auth login`. It is never an argument, and never printed. Only
--publish needs it, and private repositories.

Exit codes: 0 finished, 2 wrong folder, name or token, or the Hub refuses, 130 interrupted.
"""
import argparse
import os
import signal
import sys
from typing import List, Optional

if __name__ == '__main__':  # Ctrl-C while PyTorch is imported ends without a traceback
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b'publish.py: interrupted\n'), os._exit(130)))

import smpconv_models  # noqa: F401 (registers the models with timm)
from smpconv_models import hub
from smpconv_models.utils import streams


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='publish.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument('folder', metavar='FOLDER', help='folder of hub/convert.py')
    parser.add_argument('repo', metavar='OWNER/NAME', help='name of the repository')
    parser.add_argument('--publish', action='store_true', help='make the changes (default: print them)')
    parser.add_argument('--force', action='store_true', help='replace other weights in the repository')
    parser.add_argument(
        '--private', action='store_true', help='create a private repository; an existing one must be private')
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
        print(f'{done.repo}: a new repository' + (
            '' if done.has_token else ', unless it is private: without a token only public ones are visible'))
    for name, change in done.changes.items():
        print(f'{change:8} {name}')
    if done.url:
        print(f'published: {done.url}')
    elif all(change == 'same' for change in done.changes.values()):
        print(f'{done.repo} is up to date')
    else:
        print('nothing was sent; --publish makes these changes' + ('' if done.has_token else ' and needs a token'))
    return 0


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    streams.keep_writable()
    sys.exit(main())
