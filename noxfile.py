"""Checks in environments of their own: `nox`, or one of them, as in `nox -s "tests-3.10(versions='oldest')"`.

The Pythons are those of the classifiers in pyproject.toml, and the oldest versions those of tests/oldest.txt. Words
after `--` are arguments of pytest. The workflows in .github run these sessions. The targets of the Makefile share one
environment instead.
"""
import nox

nox.options.default_venv_backend = 'venv'
PYTHONS = nox.project.python_versions(nox.project.load_toml('pyproject.toml'))


@nox.session(python=PYTHONS)
@nox.parametrize('versions', ['oldest', 'newest'])
def tests(session: nox.Session, versions: str) -> None:
    """Run the tests with the oldest or the newest supported versions of PyTorch and timm."""
    session.install('--editable', '.[test]', *(['--constraint', 'tests/oldest.txt'] if versions == 'oldest' else []))
    session.run('pytest', '--numprocesses', '2', '--dist', 'worksteal', *session.posargs, env={'OMP_NUM_THREADS': '1'})


@nox.session
def lint(session: nox.Session) -> None:
    """Run ruff and mypy."""
    make(session, 'lint')


@nox.session
def docs(session: nox.Session) -> None:
    """Build the pages as a site."""
    make(session, 'docs')


@nox.session
def release(session: nox.Session) -> None:
    """Build and check the files of a release."""
    make(session, 'release-check')


def make(session: nox.Session, target: str) -> None:
    """Make a target of the Makefile, with the session's environment in place of .venv."""
    session.run('make', target, f'VENV={session.virtualenv.location}', external=True)
