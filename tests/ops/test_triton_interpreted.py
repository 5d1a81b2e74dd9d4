"""Tests of kernels in a process with Triton's interpreter, which is chosen when Triton is imported."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('triton', reason='PyTorch brings Triton on Linux only')
HERE = Path(__file__).parent


@pytest.mark.timeout(600)
@pytest.mark.parametrize(('file', 'which'), [
    ('test_triton.py', 'triton and not public_function and not every_form and not tuned_tiles'),
    ('test_conv1d.py', 'on_triton'),
    # half a minute, and minutes, of interpreting, on every shape:
    pytest.param('test_depthwise.py', 'triton', marks=pytest.mark.slow),
    pytest.param('test_triton.py', 'public_function or every_form or tuned_tiles', marks=pytest.mark.slow),
    pytest.param('test_backends.py', 'triton and not k31 and not k51', marks=pytest.mark.slow),  # 5 s a case of them
])
def test_under_the_interpreter(file, which):
    """The kernels' tests, and those of the tests of all backends that run this backend."""
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', str(HERE / file), '-k', which]
    result = subprocess.run(
        command, env={**os.environ, 'TRITON_INTERPRET': '1'}, cwd=HERE.parents[1],
        capture_output=True, text=True, timeout=590)
    assert result.returncode == 0, result.stdout[-5000:]
    assert ' passed' in result.stdout
