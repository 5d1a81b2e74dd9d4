"""A release: its files, what they install, and the pages and workflows that state versions."""
import re
import signal
import subprocess
import sys
import time
import zipfile
from functools import partial
from importlib import metadata

import pytest
import release_check
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from programs import ROOT

import smpconv_models
import train
import validate
from smpconv_models.training import cli

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())
PYTHONS = [
    classifier.rpartition(' ')[2] for classifier in PYPROJECT['project']['classifiers']
    if re.fullmatch(r'Programming Language :: Python :: 3\.\d+', classifier)]
YAML_FILES = sorted([*(ROOT / '.github').rglob('*.yml'), ROOT / '.pre-commit-config.yaml', ROOT / 'CITATION.cff'])


# --- files, and what they install ---


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    return release_check.build(tmp_path_factory.mktemp('dist'), '--no-isolation')


@pytest.fixture(scope='module')
def installed(built, tmp_path_factory):
    """Folder with the files of the wheel, as pip would install them."""
    folder = tmp_path_factory.mktemp('site-packages')
    zipfile.ZipFile(built[1]).extractall(folder)
    return folder


def test_files_of_a_release_are_complete_and_small(built):
    release_check.check_contents(*built)


@pytest.mark.parametrize(('name', 'told'), [
    ('smpconv_models/recipes/digits.yaml', r"lacks files: \['smpconv_models/recipes/digits.yaml'\]"),
    ('LICENSE', 'has no LICENSE'),
    (None, r"files that are not expected.*: \['tests/test_release.py'\]")])
def test_a_wheel_with_a_missing_or_another_file_is_refused(name, told, built, tmp_path):
    changed = tmp_path / built[1].name
    with zipfile.ZipFile(built[1]) as whole, zipfile.ZipFile(changed, 'w') as file:
        for other in whole.namelist():
            if name is None or not other.endswith(name):
                file.writestr(other, whole.read(other))
        if name is None:
            file.writestr('tests/test_release.py', '')
    with pytest.raises(ValueError, match=told):
        release_check.check_contents(built[0], changed)


def test_console_scripts_and_recipes_are_found_where_they_are_installed(installed):
    distribution, = metadata.distributions(path=[str(installed)])
    assert distribution.version == smpconv_models.__version__
    names = {script.name for script in distribution.entry_points}
    assert {'smpconv-predict', 'smpconv-train', 'smpconv-validate'} <= names
    code = '''
import os
from importlib import metadata
found, = metadata.distributions(path=['.'])
programs = {script.name: script.load() for script in found.entry_points.select(group='console_scripts')}
assert all(map(callable, programs.values()))
assert os.environ['OMP_WAIT_POLICY'] == 'passive'
import smpconv_models.training
assert os.path.samefile(os.path.dirname(smpconv_models.__file__), 'smpconv_models')
print(*(path.relative_to(os.getcwd()) for path in smpconv_models.training.cli.list_recipes().values()))
import sys
sys.argv[1:] = ['--config', 'digitz']
programs['smpconv-train']()
'''
    done = subprocess.run([sys.executable, '-c', code], cwd=installed, capture_output=True, text=True, timeout=120)
    recipes = sorted(path.name for path in (ROOT / 'recipes').iterdir())
    assert done.stdout.split() == [f'smpconv_models/recipes/{name}' for name in recipes]
    assert done.returncode == 2
    assert done.stderr.startswith('smpconv-train: error: --config digitz cannot be read: ')


def test_an_editable_installation_has_the_console_scripts(tmp_path):
    release_check.copy_sources(tmp_path)
    python = partial(subprocess.run, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=120)
    python([sys.executable, '-c', 'from setuptools import build_meta; print(build_meta.build_editable("."))'])
    wheel, = tmp_path.glob('*.whl')
    zipfile.ZipFile(wheel).extractall(tmp_path / 'site-packages')
    code = '''
import importlib.util, site
site.addsitedir('site-packages')
for name in 'train', 'validate':
    print(importlib.util.find_spec(f'smpconv_programs.{name}').origin)
'''
    found = python([sys.executable, '-IS', '-c', code]).stdout.split()  # without another editable installation
    assert found == [str(tmp_path / 'train.py'), str(tmp_path / 'validate.py')]


def test_a_manual_has_the_commands_of_the_console_script():
    manual = cli.manual(train.__doc__, 'smpconv-train')
    assert 'smpconv-train --config digits ' in manual
    assert 'torchrun --nproc_per_node 4 --no-python smpconv-train ...' in manual
    assert 'train.py' not in manual
    assert 'smpconv-validate --checkpoint output/digits ' in cli.manual(validate.__doc__, 'smpconv-validate')
    assert cli.manual(train.__doc__, 'train.py') == train.__doc__


@pytest.mark.slow  # seconds of standing still
@pytest.mark.parametrize('name', ['train', 'validate'])
def test_an_interrupt_while_pytorch_loads_is_one_line(name, installed):
    script = installed / f'smpconv-{name}'
    script.write_text(f'from smpconv_programs.{name} import run\nrun()\n')
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ('', f'smpconv-{name}: interrupted\n')
    assert process.returncode == 130


# --- versions ---


def test_pages_state_the_version():
    title, = re.findall(r'^## \[(.*?)\]', (ROOT / 'CHANGELOG.md').read_text(), re.MULTILINE)[:1]
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert {title, citation['version']} == {smpconv_models.__version__}


def test_the_citation_is_that_of_the_paper():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert {'cff-version', 'message', 'title', 'authors'} <= set(citation)
    assert citation['license'] == PYPROJECT['project']['license']
    paper, readme = citation['preferred-citation'], ' '.join((ROOT / 'README.md').read_text().split())
    authors = ' and '.join(author['family-names'] for author in paper['authors'])
    assert f'*{paper["title"]}* by {authors}, CVPR {paper["year"]}' in readme and paper['url'] in readme
    assert paper['url'] == PYPROJECT['project']['urls']['Paper']


@pytest.mark.parametrize('path', YAML_FILES, ids=lambda path: path.name)
def test_yaml_is_read(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_every_supported_python_is_tested_with_the_oldest_and_the_newest_versions():
    jobs = yaml.safe_load((ROOT / '.github/workflows/tests.yml').read_text())['jobs']
    assert jobs['tests']['strategy']['matrix'] == {'python': PYTHONS, 'versions': ['oldest', 'newest']}
    assert PYPROJECT['project']['requires-python'] == f'>={PYTHONS[0]}'
    sessions = re.findall(r'^def (\w+)\(session: nox.Session', (ROOT / 'noxfile.py').read_text(), re.MULTILINE)
    assert {'tests', *jobs['checks']['strategy']['matrix']['session']} <= set(sessions)


def test_the_oldest_versions_are_the_lower_bounds():
    oldest = {
        line.partition('==')[0]: Version(line.partition('==')[2].removesuffix('.*'))
        for line in (ROOT / 'tests/oldest.txt').read_text().splitlines() if not line.startswith('#')}
    bounds = {
        requirement.name: Version(bound.version)
        for requirement in map(Requirement, PYPROJECT['project']['dependencies'])
        for bound in requirement.specifier if bound.operator == '>='}
    assert {name: version for name, version in oldest.items() if name in bounds} == bounds
    assert set(oldest) - set(bounds) == {'torchvision'}  # of the oldest torch
