"""Values that a checkpoint describes: typed, bounded, refused by the name of their field."""
from argparse import Namespace

import pytest
import torch

from smpconv_models import checkpoint

FIELDS, TEXTS = ('model', 'model_kwargs', 'classes', 'epoch', 'seed'), ('dataset', 'data_dir', 'val_split')


def test_descriptions_of_both_kinds_of_files():
    ours = checkpoint.describe({
        'args': {'model': 'smpconv_t', 'img_size': 32, 'mean': [0.5], 'seed': 3, 'dataset': 'digits', 'lr': 1e-3},
        'model_kwargs': {'num_classes': 2, 'dims': (4, 8)}, 'classes': ['a', 'b'], 'epoch': 4})
    assert (ours.model, ours.model_kwargs) == ('smpconv_t', {'num_classes': 2, 'dims': (4, 8)})
    assert ours.preparation() == {'img_size': 32, 'mean': [0.5]}
    assert (ours.classes, ours.epoch, ours.seed, ours.text('dataset')) == (['a', 'b'], 4, 3, 'digits')
    timms = checkpoint.describe({'arch': 'x', 'args': Namespace(
        model='resnet18', num_classes=5, gp=None, in_chans=None, interpolation='', model_kwargs={'drop_rate': 0.1})})
    assert (timms.model, timms.model_kwargs) == ('resnet18', {'num_classes': 5, 'drop_rate': 0.1})
    assert timms.preparation() == {} and timms.classes is None
    for bare in ({'w': torch.ones(1)}, [], None):
        described = checkpoint.describe(bare)
        assert (described.model, described.model_kwargs, described.preparation()) == (None, {}, {})
        assert (described.classes, described.epoch, described.text('data_dir')) == (None, None, None)


@pytest.mark.parametrize('content, field', [
    ({'args': {'mean': torch.ones(2)}}, r'args\.mean'), ({'args': {'model': 5}}, r'args\.model'),
    ({'args': {'seed': True}}, r'args\.seed'), ({'args': {'seed': -1}}, r'args\.seed'),
    ({'args': {'img_size': 4097}}, r'args\.img_size'), ({'args': {'img_size': 'x'}}, r'args\.img_size'),
    ({'args': {'input_size': [3, 0]}}, r'args\.input_size'), ({'args': {'mean': 'abc'}}, r'args\.mean'),
    ({'args': {'interpolation': 'nope'}}, r'args\.interpolation'), ({'args': {'crop_pct': 'x'}}, r'args\.crop_pct'),
    ({'model_kwargs': {'pretrained': True}}, 'got pretrained'),
    ({'args': {'model_kwargs': {'checkpoint_path': 'x.pth'}}}, 'got checkpoint_path'),
    ({'args': {'input_size': [3, 10 ** 4999, 1]}}, 'args.input_size'),
    ({'args': {'std': [0.]}}, r'args\.std'), ({'args': {'mean': [float('nan')]}}, r'args\.mean'),
    ({'args': {'mean': [0.5] * 65}}, r'args\.mean'), ({'args': {'crop_pct': float('inf')}}, r'args\.crop_pct'),
    ({'args': {'dataset': 5}}, r'args\.dataset'), ({'args': {'val_split': ['a']}}, r'args\.val_split'),
    ({'classes': {'a': 0}}, 'classes'), ({'epoch': 'last'}, 'epoch'), ({'epoch': 0.5}, 'epoch'),
    ({'classes': ['a' * 5000]}, r'classes\[0\]'),
    ({'model_kwargs': [1]}, 'model_kwargs'), ({'model_kwargs': {'a': [[[[1]]]]}}, r'model_kwargs\.a'),
    ({'model_kwargs': {'a': 1 << 21}}, r'model_kwargs\.a'), ({'model_kwargs': {'a': 'x' * 101}}, r'model_kwargs\.a'),
    ({'model_kwargs': {'pretrained_cfg': {}}}, 'pretrained_cfg'), ({'model_kwargs': {'device': 'x'}}, 'device'),
    ({'model_kwargs': {'a': {'b': {'c': [1, 1 << 21]}}}}, r'model_kwargs\.a'),
    ({'model_kwargs': {'a': [[1] * 10] * 7}}, r'model_kwargs\.a'), ({'model_kwargs': {'a': {'x' * 101: 1}}}, '.a must'),
    ({'model_kwargs': {'a': {'b': [{'pretrained': True}]}}}, 'got pretrained'),
    ({'args': {'model_kwargs': {'cache_dir': 'x'}}}, 'cache_dir'),
    ({'args': {'num_classes': [[[[5]]]]}}, 'num_classes'),
])
def test_wrong_values_are_refused_by_their_field(content, field):
    described = checkpoint.describe(content, 'a.pth')
    with pytest.raises(ValueError, match=field) as error:
        described.preparation()
        for name in FIELDS:
            getattr(described, name)
        list(map(described.text, TEXTS))
    line = str(error.value)
    assert line.startswith('a.pth: ') and len(line) < 400 and len(line.splitlines()) == 1


@pytest.mark.parametrize('content', [
    {'args': {'seed': -1}}, {'epoch': 'last'}, {'epoch': 1.5}, {'classes': 10}, {'args': ['--lr', '1']},
    {'args': {'data_dir': ['a', 'b']}}, {'args': {'batch_size': torch.ones(2)}}])
def test_a_wrong_value_that_is_not_read_does_no_harm(content, caplog):
    content = {**content, 'model_kwargs': {'num_classes': 2}}
    described = checkpoint.describe(content)
    assert (described.model, described.model_kwargs, described.preparation()) == (None, {'num_classes': 2}, {})
    assert (described.classes, described.text('dataset'), described.text('val_split')) == (None, None, None)
    assert [record.getMessage() for record in caplog.records] == [
        "checkpoint: args is ['--lr', '1'], not a dictionary or a namespace, and is ignored"
        for _ in range(isinstance(content.get('args'), list))]


def test_nested_arguments_describe_a_network():
    kwargs = {'block_args': {'attn_layer': 'se', 'attn_kwargs': {'rd_ratio': 0.25, 'sizes': [1, 2]}}, 'dims': [[4, 8]]}
    assert checkpoint.check_model_kwargs(kwargs) == kwargs


@pytest.mark.parametrize('value, line', [
    ([10 ** 5000], '[a number of 16610 bits]'), ([[[[[1]]]]], '[[[[...]]]]'), ({'a': torch.ones(2)}, "{'a': a Tensor}"),
    ([0] * 10 ** 6, '[0, 0, 0, 0, 0, 0, 0, 0, ...]'), (None, 'None'), (True, 'True'), ('a\nb', r"'a\nb'"),
])
def test_values_are_shown_in_one_short_line(value, line):
    assert checkpoint.shown(value) == line
    for _ in range(40):  # as long as 2 ** 40 entries
        value = [value, value]
    assert len(checkpoint.shown(value)) <= 200


def test_names_of_a_file_stay_in_one_short_line():
    state = torch.nn.Linear(1, 1).state_dict()
    for name in ('a\nb', 'a\rb', 'x' * 5000):
        line = checkpoint.describe_mismatch({**state, name: torch.ones(1)}, torch.nn.Linear(1, 1))
        assert len(line.splitlines()) == 1 and len(line) < 400 and 'unknown' in line
        with pytest.raises(ValueError) as error:
            checkpoint.check_finite({name: torch.tensor(float('nan'))})
        assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 400
