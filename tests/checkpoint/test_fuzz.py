"""Files changed at random: each is read or refused in one line, and nothing else is opened, reached or run."""
import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize('count', [
    2000,
    pytest.param(20000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),  # ten minutes
])
def test_changed_files_are_read_or_refused(count):
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name('fuzz.py'), '--seed', '0', '--count', str(count)],
        capture_output=True, text=True)
    summary = json.loads(done.stdout)
    assert summary['bad'] == [] and done.returncode == 0, done.stderr
    for kind in ('zip', 'legacy', 'safetensors', 'values', 'legacy values', 'config', 'yaml', 'run'):
        assert summary['outcomes'].get(f'{kind}: refused', 0) > 0, summary['outcomes']
    assert sum(summary['outcomes'].values()) == count
