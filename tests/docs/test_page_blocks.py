"""Code blocks of the pages: Python runs, command lines are parsed by their programs, and cheap ones run.

A collector of a library (sybil, pytest-markdown-docs) would not know the programs' parsers, and needs a root conftest
for pages outside of tests/. For Python alone, the loop below is shorter than its configuration.
"""
import argparse
import importlib
import itertools
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.run
from pages import PAGES, blocks, commands, name_of
from programs import ROOT, load

from smpconv_models.training import cli

PYPROJECT = (ROOT / 'pyproject.toml').read_text()
WITH_PYTHON = [page for page in PAGES if any(block.language == 'python' for block in blocks(page))]
SHELL = ('cd', 'export', 'git', 'rm')  # programs whose arguments are not checked
TIMMS = '--device-modules'  # an option of timm's own script

# --- Python ---

SMALLER = ('epochs=10', 'epochs=1')  # trains a tenth of what the page trains
SLOW = [page for page in WITH_PYTHON if SMALLER[0] in page.read_text()]


@pytest.mark.parametrize('page', [
    pytest.param(page, marks=pytest.mark.slow if page in SLOW else ()) for page in WITH_PYTHON], ids=name_of)
def test_python_runs(page, folder, remote, capsys):
    """All blocks of a page run in one namespace, and print the unnamed block that follows them."""
    namespace = {'x': torch.randn(2, 4, 32, 32), 'weight': torch.randn(4, 1, 15, 15)}
    for block in blocks(page):
        if block.language == 'python':
            text = block.text.replace(*SMALLER)
            exec(compile('\n' * block.line + text, str(page), 'exec'), namespace)
            printed = capsys.readouterr().out
            assert block.output is None or printed == block.output


# --- command lines are parsed ---


class Parsed(BaseException):
    """A program has parsed its arguments."""


@pytest.fixture
def parse(monkeypatch):
    """Return a function that calls a program's main function until the program has parsed its arguments."""
    depth = 0

    def until_parsed(parse_args):
        def parse_and_stop(*args, **kwargs):
            nonlocal depth
            depth += 1
            try:
                parsed = parse_args(*args, **kwargs)
            finally:
                depth -= 1
            if depth == 0:  # otherwise it was called by another of these functions
                raise Parsed
            return parsed
        return parse_and_stop

    def parse(main, arguments):
        with monkeypatch.context() as patched:
            patched.chdir(ROOT)
            patched.setattr(sys, 'argv', ['program', *arguments])
            for owner, name in (
                    (argparse.ArgumentParser, 'parse_args'), (argparse.ArgumentParser, 'parse_intermixed_args'),
                    (cli.Parser, 'parse_args'), (cli, 'parse_args')):
                patched.setattr(owner, name, until_parsed(getattr(owner, name)))
            try:
                main()
            except SystemExit as end:  # --help
                assert not end.code
            except Parsed:
                pass
    return parse


def main_of(program, arguments):
    """Return the main function of a command line, None if the script has none, and its arguments."""
    if Path(program).name == 'torchrun':
        args = torch.distributed.run.get_args_parser().parse_args(arguments)
        program, arguments = 'python', [args.training_script, *args.training_script_args]
    installed = re.search(rf'^{re.escape(program)} = "([\w.]+):\w+"$', PYPROJECT, re.M)
    if installed:
        package, _, name = installed[1].partition('.')
        if package != 'smpconv_programs':
            return importlib.import_module(installed[1]).main, arguments
        program, arguments = 'python', [f'{name}.py', *arguments]  # one of the scripts in the root
    assert re.fullmatch(r'python[\d.]*', Path(program).name), f'unknown program {program}'
    if arguments[0] != '-m':
        script = ROOT / arguments[0]
        assert script.is_file(), f'no script {arguments[0]}'
        return load(arguments[0].removesuffix('.py')).main if 'main' in script.read_text() else None, arguments[1:]
    name = arguments[1]
    if name == 'smpconv_models.run':  # the program that it runs is of somebody else
        assert arguments[2] == '-m' or arguments[2].endswith('.py')
        return None, []
    if Path(ROOT, *name.split('.')).is_dir():
        name += '.__main__'
    return importlib.import_module(name).main, arguments[2:]


def check_make(arguments):
    targets = re.search(r'^\.PHONY: (.*)$', (ROOT / 'Makefile').read_text(), re.M)[1].split()
    assert {word for word in arguments if '=' not in word} <= set(targets)


def check_pip(arguments):
    """Extras of this package exist."""
    extras = set(re.findall(r'^(\w+) = \[', PYPROJECT.partition('[project.optional-dependencies]')[2], re.M))
    for word in arguments:
        for found in re.findall(r'^(?:\.|smpconv_models|smpconv-models)\[(.*)\]', word):
            assert set(found.split(',')) <= extras


def check_pytest(arguments):
    """Markers and files exist."""
    marks = {after for word, after in itertools.pairwise(arguments) if word == '-m'}
    assert marks <= set(re.findall(r'^    "(\w+): ', PYPROJECT, re.M))
    paths = [word.partition('::')[0] for word in arguments if word.startswith('tests')]
    assert all((ROOT / path).exists() for path in paths)


CHECKS = {'make': check_make, 'pip': check_pip, 'pytest': check_pytest}


@pytest.mark.parametrize('words', [
    pytest.param(words, id=f'{name_of(page)}:{line}') for page in PAGES for line, words in commands(page)])
def test_commands_are_parsed(words, parse):
    check_command(words, parse)


def check_command(words, parse):
    words = [word for word in words if word != '...']
    while re.match(r'\w+=', words[0]):  # variables of the environment
        del words[0]
    program, *arguments = words
    if TIMMS in words or program in SHELL:
        return
    if arguments[:2] in (['-m', 'pytest'], ['-m', 'pip']):
        program, arguments = arguments[1], arguments[2:]
    if program in CHECKS:
        CHECKS[program](arguments)
        return
    main, arguments = main_of(program, arguments)
    if main is None:
        assert not arguments, f'{program}: the script has no options'
    else:
        parse(main, arguments)


@pytest.mark.parametrize('line', [
    'python train.py --epoch 3', 'python train.py --config recipes/none.yaml', 'python nothing.py', 'make nothing',
    'torchrun --nproc 2 train.py --nothing', 'python -m smpconv_models.figures field --output x.png',
    'python hub/convert.py A B C', 'python examples/features.py --fast', "pip install '.[nothing]'",
    'unknown', 'python -m nothing',
    'pytest tests/nothing.py', 'pytest -m nothing', 'python benchmarks/speech.py --limits 3',
    'python experiments/ablations.py --config recipes/digits.yaml --nothing',
])
def test_a_wrong_command_is_found(line, parse):
    with pytest.raises((AssertionError, ImportError, SystemExit)):
        check_command(shlex.split(line), parse)


# --- cheap commands run ---

FIGURES = 'python -m smpconv_models.figures'
CHEAP = [
    'python validate.py --checkpoint output/digits --per-class-results classes.csv --confusion-matrix confusion.png',
    'python validate.py --checkpoint output/digits --img-size 64 --model-kwargs kernel_scale=2',
    f'{FIGURES} kernels --checkpoint output/digits --output kernels.png',
    f'{FIGURES} stages --checkpoint output/digits --untrained --output stages.png',
    f'{FIGURES} heat-map --checkpoint output/digits --layer stages.1 --output heat.png',
    'python hub/convert.py output/digits/model_best.pth.tar FOLDER',
]
# Commands that take longer, by what they are about, with options that make them small.
LONGER = {
    'table': [('python -m smpconv_models', '')],
    'receptive field': [
        (f'{FIGURES} receptive-field --checkpoint output/digits --untrained --img-size 128 --output field.png', '')],
    'snapshots': [
        ('python train.py --config recipes/digits.yaml --save-interval 1 --experiment snapshots', '--epochs 2'),
        (f'{FIGURES} animation --checkpoint output/snapshots --columns 4 --layer '
         'stages.0.blocks.0.mixer.large_kernel.large.conv stages.1.blocks.0.mixer.large_kernel.large.conv '
         '--output points.gif', '')],
    'other networks': [
        ('python train.py --config recipes/digits.yaml --img-size 32 --experiment resnet '
         "--model resnet18 --model-kwargs 'channels=(8,16,32,64)' output_stride=16", '--epochs 1'),
        ('python train.py --config recipes/digits.yaml --img-size 32 --experiment convnext '
         "--model convnext_atto --model-kwargs 'dims=(8,16,32,64)' output_stride=16", '--epochs 1'),
        ('python docs/pictures.py fields --runs output/digits output/resnet output/convnext', '')],
    'sequences': [('python train.py --config recipes/sequential_digits.yaml', '--epochs 1')],
    'permuted': [('python train.py --config recipes/permuted_digits.yaml', '--epochs 1')],
}


def run(line, small, folder, monkeypatch):
    """Run a command of a page, with further options that make it small; its --output must be there afterwards."""
    words = shlex.split(line)
    assert any(words == found for page in PAGES for _, found in commands(page)), f'no page has the command {line}'
    main, arguments = main_of(words[0], words[1:])
    monkeypatch.setattr(sys, 'argv', ['program', *arguments, *shlex.split(small)])
    assert main() == 0
    outputs = [after for word, after in itertools.pairwise(words) if word in ('--output', '--per-class-results')]
    assert all((folder / path).stat().st_size > 100 for path in outputs)


@pytest.mark.parametrize('line', CHEAP)
def test_cheap_commands_run(line, folder, monkeypatch):
    (folder / 'FOLDER').unlink()
    run(line, '', folder, monkeypatch)


@pytest.mark.slow  # a minute together
@pytest.mark.parametrize('name', LONGER)
def test_longer_commands_run(name, folder, monkeypatch):
    monkeypatch.setattr(load('docs/pictures'), 'FOLDER', folder)  # otherwise the repository's picture is replaced
    for line, small in LONGER[name]:
        run(line, small, folder, monkeypatch)
