"""Checks of a release in environments of their own: `nox`, or `nox -s "tests(python='3.10', versions='oldest')"`.

Words after `--` are arguments of pytest. `.github/workflows/tests.yml` runs the same sessions. The Makefile's targets
use one environment in `.venv` instead.
"""
import nox

nox.options.default_venv_backend = 'venv'
PYTHONS = nox.project.python_versions(nox.project.load_toml('pyproject.toml'))


@nox.session(python=PYTHONS)
@nox.parametrize('versions', ['oldest', 'newest'])
def tests(session: nox.Session, versions: str) -> None:
    """Run the tests with the oldest or the newest supported versions of PyTorch and timm."""
    constraints = ['--constraint', 'tests/oldest.txt'] if versions == 'oldest' else []
    session.install('--editable', '.[test]', *constraints)
    session.run('pytest', '--numprocesses', '2', '--dist', 'worksteal', *session.posargs, env={'OMP_NUM_THREADS': '1'})


@nox.session
def lint(session: nox.Session) -> None:
    """Run ruff and mypy."""
    session.install('--editable', '.[dev]')
    session.run('ruff', 'check', '.')
    session.run('mypy')
