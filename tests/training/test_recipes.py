"""The paper's recipes, to the letter."""
from pathlib import Path

import pytest

import train
from smpconv_models.training import cli

RECIPES = Path(__file__).parents[2] / 'recipes'

# Appendix A.2, and the original release where it says nothing.
COMMON = dict(
    global_batch_size=2048, sync_bn=True, opt='adamw', opt_betas=[0.9, 0.999], opt_eps=1e-8, weight_decay=0.05, lr=4e-3,
    sched='cosine', warmup_epochs=10, min_lr=1e-6, aa='rand-m9-mstd0.5-inc1', reprob=0.25, remode='pixel', recount=1,
    smoothing=0.1, mixup=0.8, cutmix=1., mixup_prob=1., mixup_switch_prob=0.5, mixup_mode='batch', mixup_off_epoch=0,
    train_interpolation='random', model_ema=True, model_ema_decay=0.9999, model_ema_warmup=False, hflip=0.5, vflip=0.,
    scale=[0.08, 1.], ratio=[3 / 4, 4 / 3], drop=None, clip_grad=None, layer_decay=None, no_aug=False,
)


@pytest.mark.parametrize('name, model, epochs, drop_path', [
    ('imagenet_t', 'smpconv_t', 300, 0.1),
    ('imagenet_b', 'smpconv_b', 300, 0.5),
    ('imagenet_mobile31', 'smpconv_mobile31', 120, 0.),
    ('imagenet_mobile51', 'smpconv_mobile51', 120, 0.),
])
def test_recipes_are_the_papers(name, model, epochs, drop_path):
    args = cli.parse_args(train.create_parser(), ['--config', str(RECIPES / f'{name}.yaml')])
    expected = dict(COMMON, model=model, epochs=epochs, drop_path=drop_path, experiment=name)
    assert {key: getattr(args, key) for key in expected} == expected
    assert args.global_batch_size % args.batch_size == 0


def test_every_recipe_is_held():
    assert {path.stem for path in RECIPES.iterdir()} == {
        'digits', 'imagenet_t', 'imagenet_b', 'imagenet_mobile31', 'imagenet_mobile51', 'sequential_digits',
        'permuted_digits', 'ablation_digits', 'finetune', *(name for name, *_ in SMALL_RECIPES)}


# Table 10, and the original release where it says nothing.
SMALL = dict(
    opt='adam', weight_decay=1e-5, sched='cosine', min_lr=1e-6, smoothing=0., mixup=0., cutmix=0., clip_grad=None,
    model_ema=False, drop=None)


SMALL_RECIPES = [
    ('smnist', 'smpconv_smnist', 'seq/mnist', 'test', 1e-4, 200, 5, 64),
    ('pmnist', 'smpconv_smnist', 'seq/permuted-mnist', 'test', 1e-4, 200, 5, 64),
    ('scifar10', 'smpconv_scifar10', 'seq/cifar10', 'test', 2e-4, 200, 5, 64),
    ('characters', 'smpconv_characters', 'seq/characters', 'validation', 1e-4, 300, 5, 64),
    ('speech_mfcc', 'smpconv_speech_mfcc', 'seq/speech-mfcc', 'validation', 2e-3, 300, 5, 32),
    ('speech', 'smpconv_speech', 'seq/speech', 'validation', 1e-3, 160, 10, 32),
    ('cifar10', 'smpconv_cifar', 'torch/cifar10', 'test', 5e-3, 210, 10, 64),
]


@pytest.mark.parametrize('name, model, dataset, split, lr, epochs, warmup, batch_size', SMALL_RECIPES)
def test_small_recipes_are_the_papers(name, model, dataset, split, lr, epochs, warmup, batch_size):
    args = cli.parse_args(train.create_parser(), ['--config', str(RECIPES / f'{name}.yaml')])
    expected = dict(
        SMALL, model=model, dataset=dataset, val_split=split, lr=lr, epochs=epochs, warmup_epochs=warmup,
        batch_size=batch_size, experiment=name, random_crop_pad=4 if 'cifar10' in name else None)
    assert {key: getattr(args, key) for key in expected} == expected
