"""Run any Python script or module with the models of this package registered.

    python -m smpconv_models.run validate.py --model smpconv_t --checkpoint SMPConv_T.pth ...     a script of timm
    python -m smpconv_models.run -m torch.distributed.run --nproc_per_node 4 train.py ...         a module
    python -m smpconv_models.run bulk_runner.py --model-list models.txt benchmark.py ...          with child processes

timm finds the models of this package only after ``import smpconv_models``, which other programs do not execute. In the
program and its child processes, the package is imported right after the first import of timm. Everything else is as in
``python SCRIPT.py``. One folder is prepended to the environment variable PYTHONPATH, which child processes inherit.
"""
import os
import subprocess
import sys
from pathlib import Path
from typing import List, Optional

# Folder with a sitecustomize.py, which Python imports when it starts.
_STARTUP = Path(__file__).parent / '_startup'


def main(argv: Optional[List[str]] = None) -> int:
    """Replace this process by the program's; on Windows, return the program's exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] in (['-h'], ['--help']):
        sys.stdout.write(f'{__doc__}')
        return 0
    if not arguments or (arguments[0].startswith('-') and (arguments[0] != '-m' or len(arguments) == 1)):
        sys.stderr.write(
            'python -m smpconv_models.run: error: expected SCRIPT.py or -m MODULE, and its arguments; got '
            f'{" ".join(arguments) or "nothing"}\n')
        return 2
    others = os.environ.get('PYTHONPATH')
    os.environ['PYTHONPATH'] = os.pathsep.join([str(_STARTUP), *([others] if others else [])])
    command = [sys.executable, *arguments]
    if os.name == 'nt':  # where a replaced process returns to the shell before its program ends
        return subprocess.call(command)
    sys.stdout.flush()
    os.execv(sys.executable, command)


if __name__ == '__main__':
    sys.exit(main())
