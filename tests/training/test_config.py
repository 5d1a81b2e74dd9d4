"""YAML files under a command line."""
import argparse
import re
from dataclasses import fields
from pathlib import Path

import pytest

import train
from smpconv_models.training import TrainOptions, cli, ineffective_options
from smpconv_models.training.config import _PRECONDITIONS

RECIPES = sorted((Path(__file__).parents[2] / 'recipes').glob('*.yaml'))


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser()
    parser.add_argument('--config')
    parser.add_argument('--lr', type=float, default=1.)
    parser.add_argument('--epochs', type=int, default=10)
    parser.add_argument('--scale', type=float, nargs=2)
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--mode', choices=('a', 'b'))
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=cli.ParseKwargs)
    return parser


@pytest.fixture
def parse(parser, tmp_path):
    def parse(text, *argv):
        path = tmp_path / 'options.yaml'
        path.write_text(text)
        return cli.parse_args(parser, ['--config', str(path), *argv])
    return parse


def test_values_are_typed_as_on_the_command_line(parse):
    args = parse('lr: 3e-4\nepochs: 5\nscale: [1, 2]\nchannels-last: true\nmode: b\nmodel_kwargs: {depths: [1, 2]}\n')
    assert args.lr == 3e-4 and isinstance(args.lr, float)
    assert args.epochs == 5 and args.scale == [1., 2.] and args.channels_last is True and args.mode == 'b'
    assert args.model_kwargs == {'depths': [1, 2]}


def test_the_command_line_goes_first(parse):
    assert parse('lr: 3e-4\nepochs: 5\n', '--epochs', '7').epochs == 7


def test_an_option_whose_value_may_be_left_out_is_a_switch_too(tmp_path):
    for text, expected in ('true', 'inductor'), ('false', None), ('eager', 'eager'):
        path = tmp_path / 'options.yaml'
        path.write_text(f'torchcompile: {text}')
        assert cli.parse_args(train.create_parser(), ['--config', str(path)]).torchcompile == expected


def test_null_leaves_an_option_open(parse):
    assert parse('scale: null\n').scale is None


@pytest.mark.parametrize('text, told', [
    ('epoch: 5\n', "unknown key 'epoch'; did you mean epochs?"),
    ('config: x\n', "unknown key 'config'"),
    ('crop-padding: 4\n', "unknown key 'crop-padding'; it is named --random-crop-pad now"),
    ('channels_last: "false"\n', "channels_last does not take 'false': expected true or false"),
    ('lr: fast\n', "lr does not take 'fast'"),
    ('lr: true\n', 'lr does not take True: expected a single value'),
    ('epochs: 1.5\n', 'epochs does not take 1.5'),
    ('scale: [1]\n', 'scale does not take [1]: expected 2 values'),
    ('scale: 1\n', 'scale does not take 1: expected a list'),
    ('mode: c\n', "mode does not take 'c': expected one of ['a', 'b']"),
    ('model_kwargs: 3\n', 'model_kwargs does not take 3: expected keys and values'),
    ('epochs: null\n', 'epochs does not take None: expected a value'),
    ('epochs: 5\nlr: 1\nepochs: 6\n', "'epochs' is given twice"),
    ('folder: PHOTOS\n', "unknown key 'folder'"),
    ('model_kwargs: {a: 1, a: 2}\n', "'a' is given twice"),
    ('- 1\n', 'must hold keys and values, got list'),
    ('a: [\n', 'is not YAML'),
    ('lr: ' + '[' * 3000 + ']' * 3000, 'maximum recursion depth exceeded'),
    ('lr: [&a [1], *a]', 'aliases are not supported'), ('lr: &a [*a]', 'aliases are not supported'),
    ('lr: !!bool x', 'is not YAML of options'), ('lr: !!timestamp x', 'is not YAML of options'),
    ('lr: !!int x', 'is not YAML of options'), ('lr: !!python/object:os.system {}', 'is not YAML of options'),
    ('lr: 2001-99-99\n', 'is not YAML of options: month must be in 1..12'),
    ('lr: 0x' + 'f' * 10 ** 4, 'lr does not take a number of 40000 bits'), ('? [1]\n: 2\n', 'is not YAML of options'),
    ('1: 2\n', 'unknown key 1'), (f'? {"a" * 10 ** 4}\n: 1\n', 'unknown key'),
    ('lr: "' + 'a' * 10 ** 5 + '"', 'lr does not'),
    ('model_kwargs: {checkpoint_path: x.pth}\n', 'model_kwargs must describe a network, got checkpoint_path'),
    ("model_kwargs: {pretrained_cfg_overlay: {url: 'http://127.0.0.1:9/x'}}\n", 'got pretrained_cfg_overlay'),
    ('model_kwargs: {pretrained_cfg: {hf_hub_id: evil/x}}\n', 'got pretrained_cfg'),
    ('model_kwargs: {a: {cache_dir: x}}\n', 'got cache_dir'),
])
def test_mistakes_are_reported_in_one_line(parse, text, told):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert told in str(error.value) and 'options.yaml' in str(error.value)
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


@pytest.mark.parametrize('argv, told', [
    (['--amp-dtype', 'bfloat16'], ['--amp-dtype has no effect without --amp']),
    (['--amp-dtype', 'bfloat16', '--amp'], []),
    (['--mixup-prob', '0.5'], ['--mixup-prob has no effect without --mixup or --cutmix']),
    (['--mixup', '0.2', '--mixup-switch-prob', '0.2'],
     ['--mixup-switch-prob has no effect without --mixup and --cutmix']),
    (['--no-aug', '--hflip', '0'], ['--hflip has no effect with --no-aug']),
    (['--aa', 'rand-m9', '--color-jitter', '0'], ['--color-jitter has no effect with --aa, except for 3a']),
    (['--aa', '3a', '--color-jitter', '0'], []),
    (['--config', 'CONFIG', '--mixup', '0'], []),  # a part of a recipe is switched off
])
def test_options_without_effect_are_reported(tmp_path, argv, told):
    parser, path = train.create_parser(), tmp_path / 'options.yaml'
    path.write_text('mixup: 0.8\nmixup_prob: 0.5\n')
    args = cli.parse_args(parser, [str(path) if word == 'CONFIG' else word for word in argv])
    assert ineffective_options(parser, args) == told


def test_each_option_that_may_be_without_effect_exists():
    known = vars(train.create_parser().parse_args([]))
    for names, _, has_effect in _PRECONDITIONS:
        assert set(names) <= set(known)
        has_effect(argparse.Namespace(**known))  # reads only what there is


def test_help_and_page_list_the_defaults_that_differ_from_timms():
    page = (Path(__file__).parents[2] / 'docs/training.md').read_text()
    listed = set(re.findall(r'^\| `--([\w-]+)` \|.*\|.*\|$', page, re.M))
    described = {
        item.name.replace('_', '-') for group in TrainOptions.groups().values() for item in fields(group)
        if 'timm: ' in item.metadata['argument']['help']}
    assert described == listed and len(listed) == 11


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid(path):
    args = cli.parse_args(train.create_parser(), ['--config', str(path)])
    assert args.model.startswith('smpconv') if path.stem != 'finetune' else args.model is None


def test_a_recipe_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert set(cli.list_recipes()) == {path.stem for path in RECIPES}
    assert cli.parse_args(train.create_parser(), ['--config', 'digits']).experiment == 'digits'
    (tmp_path / 'digits').mkdir()  # a folder is no file of options
    assert cli.parse_args(train.create_parser(), ['--config', 'digits']).experiment == 'digits'


def test_a_file_goes_before_a_recipe_of_its_name(parser, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'digits').write_text('epochs: 7')
    assert cli.parse_args(parser, ['--config', 'digits']).epochs == 7


@pytest.mark.parametrize('name', ['digitz', 'recipes/digits.yaml', 'nowhere.yaml'])
def test_an_unknown_recipe_is_refused_with_the_known_ones(parser, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as refused:
        cli.parse_args(parser, ['--config', name])
    hint = '' if name == 'nowhere.yaml' else '; did you mean digits?'
    names = ', '.join(path.stem for path in RECIPES)
    assert str(refused.value) == (
        f'--config {name} cannot be read: neither a file nor a recipe has this name; known recipes: {names}{hint}')


@pytest.mark.parametrize('text', [
    "data-dir: 'pipe:touch trap; echo ://'", "val-split: 'pipe:touch trap'", 'data-dir: https://evil/x',
    "val-split: '{http,file}://evil/x.tar|1'", "val-split: 'pip{e:touch trap,}.tar|1'", 'model: hf-hub:evil/x',
    'dataset: hfds/evil/x', 'dataset: tfds/x'])
def test_a_file_does_not_say_what_is_fetched_or_run(tmp_path, text):
    path = tmp_path / 'args.yaml'
    path.write_text(text)
    option, value = text.split(': ', 1)
    with pytest.raises(ValueError, match=f'expected --{option} on the command line for what is fetched or run'):
        cli.parse_args(train.create_parser(), ['--config', str(path)])
    if option != 'model':
        given = cli.parse_args(train.create_parser(), [f'--{option}', value.strip("'")])
        assert getattr(given, option.replace('-', '_')) == value.strip("'")


@pytest.mark.parametrize(('argv', 'message'), [
    (['--snapshot-interval', '1'], 'unrecognized arguments: --snapshot-interval; it is named --save-interval now'),
    (['--epoch=3'], 'unrecognized arguments: --epoch=3; did you mean --epochs?'),
])
def test_an_unknown_option_is_an_error_with_a_suggestion(capsys, argv, message):
    with pytest.raises(SystemExit):
        train.create_parser().parse_args(argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(('group', 'values', 'message'), [
    ('data', {'batch_size': 0}, 'batch_size must be at least 1'), ('run', {'epochs': '3'}, "whole number, got '3'"),
    ('optimizer', {'lr': -1}, 'lr must be above 0'), ('schedule', {'sched': 'foo'}, "sched must be one of ('cosine',"),
    ('augmentation', {'scale': [0.5, 2]}, 'scale must be above 0 and at most 1, got 2'),
])
def test_options_from_python_have_the_ranges_of_the_command_line(group, values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainOptions().with_values(group, **values)
