"""Files changed at random: each is read or refused in one line, and nothing else is opened, reached or run."""
import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize('count', [
    250,
    pytest.param(20000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),  # a quarter of an hour
])
def test_changed_files_are_read_or_refused(count):
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name('fuzz.py'), '--seed', '0', '--count', str(count)],
        capture_output=True, text=True)
    assert done.stdout, done.stderr
    summary = json.loads(done.stdout)
    assert summary['bad'] == [] and done.returncode == 0, done.stderr
    outcomes = summary['outcomes']
    assert len(summary['seconds']) == 12 and sum(outcomes.values()) == count
    for kind in summary['seconds']:
        # The bytes of a file differ from run to run, so that all of a few changed files may be refused.
        assert outcomes.get(f'{kind}: accepted', 0) > 0 or count < 1000, (kind, outcomes)
        assert outcomes.get(f'{kind}: refused', 0) > 0 or kind == 'holder', (kind, outcomes)  # of which none is wrong
