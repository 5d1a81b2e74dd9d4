"""The site that `make docs` builds."""
import os
import re
import subprocess
import sys
import zlib

from programs import ROOT

import smpconv_models

COMMAND = re.search(r'\$\(RUN\) -m (sphinx .*) docs docs/_build', (ROOT / 'Makefile').read_text())[1].split()
PICTURE = re.compile(r'<img[^>]*src="([^"]+)"')


def test_the_site_is_built_without_a_warning(tmp_path):
    """One test, so that the site is built once: each page with its pictures, and a reference of each public name."""
    site = tmp_path / 'site'
    done = subprocess.run(
        [sys.executable, '-m', *COMMAND, '--doctree-dir', str(tmp_path / 'trees'), 'docs', str(site)],
        cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in (ROOT / 'docs').glob('*.md'):
        pictures = PICTURE.findall((site / f'{page.stem}.html').read_text())
        assert len(pictures) == page.read_text().count('![') and all((site / path).is_file() for path in pictures)
    inventory = zlib.decompress((site / 'objects.inv').read_bytes().split(b'\n', 4)[4]).decode()
    documented = {line.split()[0] for line in inventory.splitlines() if ' py:' in line}
    assert {f'smpconv_models.{name}' for name in smpconv_models.__all__} - documented == {'smpconv_models.__version__'}
