"""Output that cannot be written ends no program."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

import smpconv_models.streams

# By its path, as the package would load PyTorch.
SCRIPT = f"""
import os, sys
sys.path.insert(0, {str(Path(smpconv_models.streams.__file__).parent)!r})
import streams
streams.keep_writable()
for _ in range(20000):
    print('a line that fills the buffer')
    sys.stderr.write('another\\n')
print('caf\\u00e9', os.fsdecode(b'image\\xff.png'))
sys.exit(3)
"""


def run(redirection, **environment):
    """Exit code of the script, standard output and error of the shell."""
    done = subprocess.run(
        ['bash', '-c', f'"{sys.executable}" -c "$0" {redirection}', SCRIPT], capture_output=True, timeout=60,
        env={**os.environ, **environment})
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize('unbuffered', ['', '1'])
@pytest.mark.parametrize('redirection', [
    '>/dev/full 2>&1', '>&- 2>/dev/null', '>/dev/null 2>&-', '>&- 2>&-', '>&- 2>&- <&-',
    '2>&1 | (sleep 0.1; exit 0); exit ${PIPESTATUS[0]}'])
def test_a_script_keeps_its_exit_code(redirection, unbuffered):
    assert run(redirection, PYTHONUNBUFFERED=unbuffered) == (3, b'', b'')


def test_what_can_be_written_is():
    code, out, error = run('')
    assert code == 3 and out.count(b'\n') == 20001 and error == b'another\n' * 20000


@pytest.mark.parametrize('encoding', ['ascii', 'utf-8', 'latin-1'])
def test_every_name_can_be_written(encoding):
    code, out, _ = run('', PYTHONIOENCODING=encoding)
    last = out.splitlines()[-1].decode(encoding)
    assert code == 3 and last == ('caf\\xe9' if encoding == 'ascii' else 'caf\u00e9') + ' image\\udcff.png'


def test_no_other_file_is_opened_in_the_place_of_a_closed_stream(tmp_path):
    script = SCRIPT.replace('for _', f"open({str(tmp_path / 'x')!r}, 'w').fileno() > 2 or os._exit(4)\nfor _")
    done = subprocess.run(['bash', '-c', f'"{sys.executable}" -c "$0" >&- 2>&-', script], timeout=60)
    assert done.returncode == 3
