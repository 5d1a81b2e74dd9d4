"""Environments that `make` creates, repairs or refuses, with Pythons that only pretend to install."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not shutil.which('make') or not shutil.which('sh'), reason='needs make and a POSIX shell')
ROOT = Path(__file__).parents[1]
# Runs code as the described version, and records modules run by -m and scripts. `-m venv` copies it.
PYTHON = '''#!{executable} -IS
import json, os, shutil, sys, types
here = os.path.dirname(os.path.abspath(__file__))
about = json.load(open(os.path.join(here, 'about.json')))
sys.version_info = (*about['version'], 0, 'final', 0)
sys.version = '.'.join(map(str, about['version'])) + '.0 (fake)'
sys.base_prefix, sys.prefix = about['base'], here if about['is_venv'] else about['base']
for name in ('pip', 'ensurepip'):
    sys.modules[name] = types.ModuleType(name) if name in about['modules'] else None
if sys.argv[1] == '-c':
    exec(sys.argv[2])
    sys.exit()
with open({log!r}, 'a') as log:
    print(*sys.argv[1:], file=log)
if sys.argv[2] == 'venv':
    folder = os.path.join(sys.argv[-1], 'bin')
    if '--clear' in sys.argv:
        shutil.rmtree(sys.argv[-1], ignore_errors=True)
    os.makedirs(folder)
    shutil.copy(__file__, os.path.join(folder, 'python'))
    about.update(is_venv=True, modules=about['modules'] + ['pip'])
elif sys.argv[2] == 'ensurepip':
    folder = here
    about['modules'].append('pip')
else:
    sys.exit()
json.dump(about, open(os.path.join(folder, 'about.json'), 'w'))
'''


class Project:
    """Copy of the Makefile, with a python3 in the search path."""

    def __init__(self, folder):
        self.folder = folder
        for name in ('Makefile', 'environment.sh', 'pyproject.toml'):
            shutil.copy2(ROOT / name, folder / name)
        self.log = folder / 'log'
        self.add_python('python3')

    def add_python(self, name, version=(3, 11), modules=('ensurepip',), base=None, is_venv=False, folder='bin'):
        path = self.folder / folder
        if folder == 'bin':
            path /= name
        path.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(PYTHON.format(executable=sys.executable, log=str(self.log)))
        (path / name).chmod(0o755)
        (path / 'about.json').write_text(json.dumps(dict(
            version=version, modules=modules, base=base or f'/{name}', is_venv=is_venv)))
        return path / name

    def make(self, *args):
        """Run make; return the exit code, the lines of both streams, and what the Pythons ran."""
        self.log.write_text('')
        path = os.pathsep.join([str(self.folder / 'bin/python3'), os.environ['PATH']])
        outer = ('PYTHON', 'MAKEFLAGS', 'MFLAGS', 'MAKELEVEL', 'MAKEOVERRIDES', 'MAKE_TERMOUT', 'MAKE_TERMERR')
        environment = {key: value for key, value in os.environ.items() if key not in outer} | {'PATH': path}
        done = subprocess.run(
            ['make', '--silent', *args], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=60)
        lines = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith('make: ***')]
        return done.returncode, lines, self.log.read_text().splitlines()


CREATE, RUN = '-m venv --clear .venv', 'train.py --config recipes/digits.yaml'
INSTALL = '-m pip install --quiet --disable-pip-version-check --editable .[demo]'


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def test_an_environment_is_created_once_and_extended(project):
    assert project.make('train') == (0, [], [CREATE, INSTALL, RUN])
    assert project.make('train') == (0, [], [RUN])
    assert project.make('test')[2][0] == INSTALL.replace('demo', 'test')
    os.utime(project.folder / 'pyproject.toml')
    later = (project.folder / '.venv/demo').stat().st_mtime + 10
    os.utime(project.folder / 'pyproject.toml', (later, later))
    assert project.make('train') == (0, [], [INSTALL, RUN])


def test_measuring_on_a_gpu_installs_nothing(project):
    arguments = ('gpu', 'ARGS=--phase check')
    assert project.make(*arguments) == (0, [], ['benchmarks/gpu.py --phase check'])
    assert not (project.folder / '.venv').exists()
    project.make('train')
    (project.folder / 'bin/python3/python3').unlink()
    assert project.make(*arguments) == (0, [], ['benchmarks/gpu.py --phase check'])


@pytest.mark.parametrize('damage', [
    lambda python: python.unlink(),
    lambda python: python.unlink() or python.symlink_to('/removed/python'),
    lambda python: shutil.rmtree(python.parent),
    lambda python: (python.parent / 'about.json').write_text(
        (python.parent / 'about.json').read_text().replace('"is_venv": true', '"is_venv": false')),
], ids=['missing', 'dangling', 'no bin', 'no environment'])
def test_an_environment_without_its_interpreter_is_created_again(project, damage):
    project.make('train')
    damage(project.folder / '.venv/bin/python')
    line = '.venv has no working Python: creating it again'
    assert project.make('train') == (0, [line], [CREATE, INSTALL, RUN])
    assert project.make('train') == (0, [], [RUN])


def test_pip_is_installed_where_it_is_missing(project):
    project.make('train')
    project.add_python('python', folder='.venv/bin', base='/python3', is_venv=True)
    assert project.make('train') == (0, ['.venv has no pip: installing it'], ['-m ensurepip', INSTALL, RUN])
    project.add_python('python', folder='.venv/bin', base='/python3', is_venv=True, modules=[])
    assert project.make('train') == (2, [
        '.venv/bin/python has no ensurepip: install it, on Debian and Ubuntu by apt install python3.11-venv'], [])


def test_an_environment_of_an_old_python_is_named(project):
    project.add_python('python', (3, 9), ('ensurepip', 'pip'), '/old', True, folder='.venv/bin')
    assert project.make('train') == (2, [
        '.venv/bin/python is Python 3.9, expected 3.10 or newer: make clean removes .venv'], [])


def test_another_python_than_the_environments_is_named(project):
    python = project.add_python('python3.12', (3, 12))
    assert project.make('train', f'PYTHON={python}')[0] == 0
    assert project.make('train') == (0, [], [RUN])  # not asked for
    assert project.make('train', f'PYTHON={python}') == (0, [], [RUN])
    assert project.make('train', 'PYTHON=python3') == (2, [
        '.venv has Python 3.12.0 in /python3.12, but PYTHON=python3 is 3.11.0 in /python3: make clean removes .venv'],
        [])


ANOTHER = 'name another, as in: make PYTHON=python3.12'


@pytest.mark.parametrize('kwargs, message', [
    (dict(version=(3, 9)), f'PYTHON is Python 3.9, expected 3.10 or newer: {ANOTHER}'),
    (dict(modules=[]), 'PYTHON has no ensurepip: install it, on Debian and Ubuntu by apt install python3.11-venv'),
    (None, f'PYTHON cannot be run: {ANOTHER}'),
])
@pytest.mark.parametrize('asked', [True, False])
def test_a_python_that_cannot_make_an_environment_is_named(project, kwargs, message, asked):
    python = project.folder / 'bin/python3/python3'
    if kwargs is None:
        python.write_text('#!/bin/sh\nexit 127\n')
    else:
        project.add_python('python3', **kwargs)
    code, lines, ran = project.make('train', *(['PYTHON=python3'] if asked else []))
    assert (code, ran) == (2, []) and len(lines) == 1
    assert lines[0].replace('PYTHON=python3 ', 'PYTHON ').replace('python3 ', 'PYTHON ', 1) == message
    assert not (project.folder / '.venv').exists()
