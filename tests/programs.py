"""Programs of this repository, called as functions in the process of the test."""
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def load(path):
    """Import a script of the repository by its path without suffix, like a script beside it."""
    folder = str((ROOT / path).parent)
    if folder not in sys.path:  # for good, as a script may import its neighbours when it runs
        sys.path.insert(0, folder)
    return importlib.import_module(Path(path).name)


def run(main, *argv):
    """Call a program's main function with arguments as on a command line; return its exit code."""
    return main([str(argument) for argument in argv])


def error_line(capsys):
    """Return the error output, which must be one line."""
    line, = capsys.readouterr().err.strip().splitlines()
    return line


def refused(main, capsys, *argv, code=2):
    """Return the one line of error output of a program that must exit with this code."""
    with pytest.raises(SystemExit) as stopped:
        run(main, *argv)
    line = error_line(capsys)
    assert stopped.value.code == code, line
    return line
