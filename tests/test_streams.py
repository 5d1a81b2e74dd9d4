"""Standard output and error that cannot be written do not end a program."""
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import smpconv_models.utils.streams

# The module is imported by its path, as the package would load PyTorch.
SCRIPT = f"""
import os, sys
sys.path.insert(0, {str(Path(smpconv_models.utils.streams.__file__).parent)!r})
import streams
streams.keep_writable()
for _ in range(20000):
    print('a line that fills the buffer')
    sys.stderr.write('another\\n')
print('caf\\u00e9', os.fsdecode(b'image\\xff.png'))
sys.exit(3)
"""


def run(redirection, **environment):
    """Return the exit code of the script, and standard output and error of the shell."""
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


def test_output_that_can_be_written_is_complete():
    code, out, error = run('')
    assert code == 3 and out.count(b'\n') == 20001 and error == b'another\n' * 20000


@pytest.mark.parametrize('encoding', ['ascii', 'utf-8', 'latin-1'])
def test_every_name_can_be_written(encoding):
    code, out, _ = run('', PYTHONIOENCODING=encoding)
    last = out.splitlines()[-1].decode(encoding)
    assert code == 3 and last == ('caf\\xe9' if encoding == 'ascii' else 'caf\u00e9') + ' image\\udcff.png'


def test_no_other_file_takes_the_descriptor_of_a_closed_stream(tmp_path):
    script = SCRIPT.replace('for _', f"open({str(tmp_path / 'x')!r}, 'w').fileno() > 2 or os._exit(4)\nfor _")
    done = subprocess.run(['bash', '-c', f'"{sys.executable}" -c "$0" >&- 2>&-', script], timeout=60)
    assert done.returncode == 3


# The pipe is full, with a line in the buffer, before its streams are replaced.
FULL = """
try:
    while True:
        os.write(1, bytes(4096))
except BlockingIOError:
    pass
try:
    sys.stderr.write('early\\n')
except BlockingIOError:
    pass
streams"""


@pytest.mark.skipif(os.name == 'nt', reason='pipes are blocking there')
@pytest.mark.parametrize('unbuffered', ['', '1'])
@pytest.mark.parametrize('is_read', [True, False])
def test_a_write_to_a_full_non_blocking_pipe_waits(is_read, unbuffered):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with subprocess.Popen(
            [sys.executable, '-c', SCRIPT.replace('\nstreams', FULL)], stdout=writer, stderr=writer,
            env={**os.environ, 'PYTHONUNBUFFERED': unbuffered}) as process:
        os.close(writer)
        with open(reader, 'rb') as pipe:
            time.sleep(0.3)  # the script waits by then
            received = pipe.read(-1 if is_read else 100).lstrip(b'\0')
        assert process.wait(60) == 3
    if is_read:
        early = b'' if unbuffered else b'early\n'  # Python's own unbuffered streams discard it
        assert received.startswith(early + b'a') and received.count(b'another\n') == 20000
        assert received.count(b'\n') == 40001 + len(early.splitlines())


@pytest.mark.skipif(os.name == 'nt', reason='a terminal in the place of a console')
def test_the_stream_of_a_windows_console_is_kept():
    script = SCRIPT.replace('\nstreams', '\nos.name = "nt"\nstreams').replace('20000', '0')
    kept = 'sys.stdout is sys.__stdout__ and sys.stderr is not sys.__stderr__'
    script = script.replace('sys.exit(3)', f'sys.exit({kept})')
    terminal, end = os.openpty()
    done = subprocess.run([sys.executable, '-c', script], stdout=end, stderr=subprocess.PIPE, timeout=60)
    os.close(end)
    with open(terminal, 'rb', buffering=0) as output:
        assert done.returncode == 1 and output.read(100) == 'caf\u00e9 image\\udcff.png\r\n'.encode()
