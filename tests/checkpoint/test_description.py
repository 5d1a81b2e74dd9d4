"""Values that a checkpoint describes: typed, bounded, refused by the name of their field."""
from argparse import Namespace

import pytest
import torch

from smpconv_models import checkpoint


def test_descriptions_of_both_kinds_of_files():
    ours = checkpoint.describe({
        'args': {'model': 'smpconv_t', 'img_size': 32, 'mean': [0.5], 'seed': 3, 'dataset': 'digits', 'lr': 1e-3},
        'model_kwargs': {'num_classes': 2, 'dims': (4, 8)}, 'classes': ['a', 'b'], 'epoch': 4})
    assert (ours.model, ours.model_kwargs) == ('smpconv_t', {'num_classes': 2, 'dims': (4, 8)})
    assert ours.preparation == {'img_size': 32, 'mean': [0.5]}
    assert (ours.classes, ours.epoch, ours.seed, ours.origin.dataset) == (['a', 'b'], 4, 3, 'digits')
    timms = checkpoint.describe({'arch': 'x', 'args': Namespace(
        model='resnet18', num_classes=5, gp=None, in_chans=None, interpolation='', model_kwargs={'drop_rate': 0.1})})
    assert (timms.model, timms.model_kwargs) == ('resnet18', {'num_classes': 5, 'drop_rate': 0.1})
    assert timms.preparation == {} and timms.classes is None
    for bare in ({'w': torch.ones(1)}, [], None):
        assert checkpoint.describe(bare) == checkpoint.Description()


@pytest.mark.parametrize('content, field', [
    ({'args': [1]}, 'args'), ({'args': {'a': torch.ones(2)}}, r'args\.a'),
    ({'args': {'a': [{'b': {1j: 2}}]}}, r'args\.a'),
    ({'args': {'seed': True}}, r'args\.seed'), ({'args': {'seed': -1}}, r'args\.seed'),
    ({'args': {'img_size': 1025}}, r'args\.img_size'),
    ({'args': {'input_size': [3, 10 ** 4999, 1]}}, 'args.input_size'),
    ({'args': {'std': [0.]}}, r'args\.std'), ({'args': {'mean': [float('nan')]}}, r'args\.mean'),
    ({'args': {'mean': [0.5] * 65}}, r'args\.mean'), ({'args': {'crop_pct': float('inf')}}, r'args\.crop_pct'),
    ({'args': {'dataset': 5}}, r'args\.dataset'), ({'args': {'val_split': ['a']}}, r'args\.val_split'),
    ({'classes': {'a': 0}}, 'classes'), ({'classes': ['a' * 5000]}, r'classes\[0\]'), ({'epoch': 0.5}, 'epoch'),
    ({'model_kwargs': [1]}, 'model_kwargs'), ({'model_kwargs': {'a': [[1]]}}, r'model_kwargs\.a'),
    ({'model_kwargs': {'a': 1 << 21}}, r'model_kwargs\.a'), ({'model_kwargs': {'a': 'x' * 101}}, r'model_kwargs\.a'),
    ({'model_kwargs': {'pretrained_cfg': {}}}, 'pretrained_cfg'), ({'model_kwargs': {'device': 'x'}}, 'device'),
    ({'args': {'model_kwargs': {'cache_dir': 'x'}}}, 'cache_dir'), ({'args': {'num_classes': [[5]]}}, 'num_classes'),
])
def test_wrong_values_are_refused_by_their_field(content, field):
    with pytest.raises(ValueError, match=field) as error:
        described = checkpoint.describe(content)
        checkpoint.check_preparation(described.preparation, 'args.')
    assert len(str(error.value)) < 300 and len(str(error.value).splitlines()) == 1


def test_names_of_a_file_stay_in_one_short_line():
    state = torch.nn.Linear(1, 1).state_dict()
    for name in ('a\nb', 'a\rb', 'x' * 5000):
        line = checkpoint.describe_mismatch({**state, name: torch.ones(1)}, torch.nn.Linear(1, 1))
        assert len(line.splitlines()) == 1 and len(line) < 400 and 'unknown' in line
        with pytest.raises(ValueError) as error:
            checkpoint.check_finite({name: torch.tensor(float('nan'))})
        assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 400
