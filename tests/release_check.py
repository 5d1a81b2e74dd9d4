"""Build the files of a release in dist/, check them, and use the wheel as somebody who has installed it.

    make release-check

The wheel is built from the sdist. It is installed outside the checkout, in an environment that has its requirements and
no extra. There the README's examples that need no data, the table of models and the console scripts run. Finally the
extra `demo` is added for a short training with a recipe of the wheel, and an evaluation.
"""
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
MAX_BYTES = 1_000_000  # of each file
# Examples of the README with these words need the network or a file. The others need only these inputs.
NEEDS_MORE = re.compile(r'pretrained=True|hub\.load|\.predict\(')
INPUTS = '''
import smpconv_models, timm, torch
x, weight = torch.randn(2, 8, 32, 32), torch.randn(8, 1, 27, 27)
'''


def build(folder, *options):
    """Build the sdist, and the wheel from it, in a folder; return their paths."""
    with tempfile.TemporaryDirectory() as copy:  # neither reads nor leaves build folders in the checkout
        copy_sources(Path(copy))
        run([sys.executable, '-m', 'build', '--outdir', folder, *options, copy], stdout=subprocess.DEVNULL)
    sdist, = Path(folder).glob('*.tar.gz')
    wheel, = Path(folder).glob('*.whl')
    return sdist, wheel


def copy_sources(folder):
    """Copy the files of the checkout's folder, and the folders that a build may take files from."""
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, folder)
    for name in ('recipes', 'smpconv_models', 'tests'):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__'))


def expected_files():
    """Return the files that a wheel must have beside its metadata: those of the checkout."""
    patterns = ('*.py', '*.json', '*.html', 'py.typed')
    package = {path for pattern in patterns for path in (ROOT / 'smpconv_models').rglob(pattern)}
    return {
        'smpconv_programs/train.py', 'smpconv_programs/validate.py',
        *(path.relative_to(ROOT).as_posix() for path in package),
        *(f'smpconv_models/recipes/{path.name}' for path in (ROOT / 'recipes').glob('*.yaml')),
    }


def check_contents(sdist, wheel):
    """Raise ValueError unless the wheel has the expected files alone, the sdist no tests, and both are small."""
    names = zipfile.ZipFile(wheel).namelist()
    differing = expected_files() ^ {name for name in names if '.dist-info/' not in name}
    if differing:
        raise ValueError(f'{wheel.name} has files that are not expected, or lacks files: {sorted(differing)}')
    if not any(name.endswith('.dist-info/licenses/LICENSE') for name in names):
        raise ValueError(f'{wheel.name} has no LICENSE')
    with tarfile.open(sdist) as file:
        tests = [name for name in file.getnames() if '/tests' in name]
    if tests:
        raise ValueError(f'{sdist.name} has tests, which do not run without the rest of the checkout: {tests}')
    for path in (sdist, wheel):
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f'{path.name} has {path.stat().st_size} bytes, expected at most {MAX_BYTES}')


class Environment:
    """Virtual environment with a wheel, and with links to the distributions that the wheel requires.

    The links lead to the running environment: to install PyTorch once more would take gigabytes and minutes. Nothing
    else of the running environment is visible, so an import that no requirement covers fails, as does an extra's.
    """

    def __init__(self, folder, wheel):
        venv.create(folder)
        self.folder, self.python = folder, folder / 'bin/python'
        self.site_packages, = folder.glob('lib/python*/site-packages')
        self.pip('install', '--quiet', '--no-deps', '--no-index', wheel)
        self.wheel, = metadata.distributions(path=[str(self.site_packages)])
        self.add()

    def add(self, *extras):
        """Link the requirements of the wheel and of its extras, with all that these require."""
        pending, found = [(self.wheel.name, extra) for extra in ('', *extras)], set()
        while pending:
            name, extra = pending.pop()
            if (name, extra) in found:
                continue
            found.add((name, extra))
            distribution = self.wheel if name == self.wheel.name else metadata.distribution(name)
            for requirement in map(Requirement, distribution.requires or ()):
                if requirement.marker is None or requirement.marker.evaluate({'extra': extra}):
                    pending += [(requirement.name, wanted) for wanted in ('', *requirement.extras)]
        for name in {name for name, _ in found} - {self.wheel.name}:
            distribution = metadata.distribution(name)
            for top in {file.parts[0] for file in distribution.files} - {'..', '__pycache__'}:
                if not (self.site_packages / top).exists():
                    (self.site_packages / top).symlink_to(distribution.locate_file(top))
        self.pip('check')

    def pip(self, *arguments):
        run([sys.executable, '-m', 'pip', '--python', self.python, *arguments], cwd=self.folder)

    def run(self, program, *arguments):
        """Run a program of the environment outside the checkout; return its standard output."""
        hidden = ('PYTHONPATH', 'VIRTUAL_ENV')
        env = {name: value for name, value in os.environ.items() if name not in hidden}
        command = [self.python.with_name(program), *arguments]
        return run(command, cwd=self.folder, env=env, stdout=subprocess.PIPE).stdout


def run(command, **options):
    words = [str(word) for word in command]
    print('+', *(word if len(word) < 200 else f'({len(word.splitlines())} lines)' for word in words), flush=True)
    return subprocess.run(words, check=True, text=True, **options)


def examples():
    """Return the README's examples that need no data, as one script."""
    blocks = re.findall(r'^```python\n(.*?)^```', (ROOT / 'README.md').read_text(), re.DOTALL | re.MULTILINE)
    return '\n'.join([INPUTS, *(block for block in blocks if not NEEDS_MORE.search(block))])


def main():
    dist = ROOT / 'dist'
    shutil.rmtree(dist, ignore_errors=True)
    sdist, wheel = build(dist)
    run([sys.executable, '-m', 'twine', 'check', '--strict', sdist, wheel])
    check_contents(sdist, wheel)
    with tempfile.TemporaryDirectory() as folder:
        environment = Environment(Path(folder), wheel)
        environment.run('python', '-c', examples())
        environment.run('python', '-m', 'smpconv_models', 'smpconv_nano')
        for script in environment.wheel.entry_points.select(group='console_scripts'):
            assert script.name in environment.run(script.name, '--help')
        environment.add('demo')
        environment.run('smpconv-train', '--config', 'digits', '--epochs', 1)
        print(environment.run('smpconv-validate', '--checkpoint', 'output/digits').splitlines()[0])
    for path in (sdist, wheel):
        print(f'{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes')


if __name__ == '__main__':
    main()
