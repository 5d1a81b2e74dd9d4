"""The site that `make docs` builds."""
import os
import re
import subprocess
import sys
import zlib

import pytest
from programs import ROOT

import smpconv_models

PICTURE = re.compile(r'<img[^>]*src="([^"]+)"')


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp('site')
    command = re.search(r'\$\(RUN\) -m (sphinx .*) docs docs/_build', (ROOT / 'Makefile').read_text())[1]
    done = subprocess.run(
        [sys.executable, '-m', *command.split(), '--doctree-dir', str(folder / 'trees'), 'docs', str(folder / 'site')],
        cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / 'site'


def test_each_page_and_its_pictures_are_built(site):
    pages = list((ROOT / 'docs').glob('*.md'))
    for page in pages:
        text = (site / f'{page.stem}.html').read_text()
        assert len(PICTURE.findall(text)) == page.read_text().count('![')
        assert all((site / source).is_file() for source in PICTURE.findall(text))


def test_each_public_name_is_in_the_reference(site):
    names = zlib.decompress((site / 'objects.inv').read_bytes().split(b'\n', 4)[4]).decode()
    documented = {line.split()[0] for line in names.splitlines() if ' py:' in line}
    assert {f'smpconv_models.{name}' for name in smpconv_models.__all__} - documented == {'smpconv_models.__version__'}
