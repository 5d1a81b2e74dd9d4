"""Runs timm's own model tests over this package's models: `python tests/timm_suite.py [pytest arguments]`.

Fetches the source distribution of the installed timm (its wheel has no tests), imports the package and lets timm's
tests see its models only. What remains is every test of tests/test_models.py that takes its models from
`timm.list_models`.
"""
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm

FOLDER = Path(__file__).resolve().parents[1] / 'build' / 'timm_suite'


class OnlyOurModels:
    """pytest plugin: while timm's tests are collected, its registry lists the models of this package alone."""

    def __init__(self) -> None:
        import smpconv_models  # noqa: F401 (registers the models)
        list_all = timm.list_models

        def list_models(filter='', module='', pretrained=False, exclude_filters='', **kwargs):
            non_standard = isinstance(filter, list) and bool(filter)
            if pretrained or non_standard or (isinstance(filter, str) and filter):
                return []  # tests of weights to download, or of other networks' names
            return list_all('smpconv*', exclude_filters=exclude_filters, **kwargs)

        timm.list_models = list_models
        timm.list_pretrained = lambda *args, **kwargs: []

    def pytest_collection_modifyitems(self, config, items):
        ours = [item for item in items if 'smpconv' in item.name]
        config.hook.pytest_deselected(items=[item for item in items if item not in ours])
        items[:] = ours


def fetch() -> Path:
    """Folder of the installed timm's source distribution, downloaded by pip if it isn't there."""
    unpacked = FOLDER / f'timm-{timm.__version__}'
    if not unpacked.is_dir():
        FOLDER.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', ':all:',
             '--dest', str(FOLDER), f'timm=={timm.__version__}'],
            check=True,
        )
        with tarfile.open(FOLDER / f'timm-{timm.__version__}.tar.gz') as archive:
            archive.extractall(FOLDER, filter='data')
    return unpacked


if __name__ == '__main__':
    suite = fetch()
    sys.exit(pytest.main(
        [str(suite / 'tests' / 'test_models.py'), '--rootdir', str(suite), '-c', str(suite / 'pyproject.toml'),
         '-p', 'no:cacheprovider', '-W', 'ignore', *sys.argv[1:]],
        plugins=[OnlyOurModels()],
    ))
