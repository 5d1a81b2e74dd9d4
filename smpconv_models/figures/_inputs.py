"""Models and images given on the command line."""
import re
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Tuple

import torch
from timm.data import create_transform, get_img_extensions
from timm.utils import reparameterize_model
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from smpconv_models import checkpoint
from smpconv_models.checkpoint.description import PREPARATION
from smpconv_models.training import Digits
from smpconv_models.training.data_config import data_config
from smpconv_models.training.image_reading import ReadImage
from smpconv_models.training.model_factory import (
    choose_model,
    create_for_checkpoint,
    create_model,
    model_arguments,
    select_weights,
)
from smpconv_models.training.run_dir import RunDir
from smpconv_models.training.skipped import ERRORS
from smpconv_models.utils.errors import first_line

from .kernels import error_prefix, evenly_spaced

_DEFAULT_SEED = 42


class LoadedModel(NamedTuple):
    """Model to plot.

    Attributes:
        label: Label in plots and messages.
        model: Model in evaluation mode.
        description: Description in its checkpoint; empty without a checkpoint.
        is_random: Whether its weights are initial ones.
        name: Name of the model.
        kwargs: Arguments of its constructor from the checkpoint.
    """
    label: str
    model: Any
    description: checkpoint.Description
    is_random: bool = False
    name: str = ''
    kwargs: Optional[Dict[str, Any]] = None


class InputBatch(NamedTuple):
    """Images in the form that a model takes.

    Attributes:
        names: Names of the files or digits.
        inputs: Normalized images, ``(N, C, H, W)``.
        pixels: The same images in [0, 1], for display.
    """
    names: List[str]
    inputs: Tensor
    pixels: Tensor


def load_models(args: Namespace) -> List[LoadedModel]:
    """Load the models of the checkpoints, or create the named one; ``--untrained`` puts a random one first.

    Raises:
        ValueError: If a file or model does not exist, or they do not fit each other.
    """
    if args.checkpoint is None:
        if args.model is None:
            raise ValueError('expected --checkpoint or --model')
        if getattr(args, 'untrained', False):
            raise ValueError('--untrained needs --checkpoint; --model without --pretrained has random weights')
        label = args.model if args.pretrained else f'{args.model}, untrained'
        model = _create(args, args.model, {}, _DEFAULT_SEED, args.pretrained)
        return [LoadedModel(label, model, checkpoint.Description(), not args.pretrained)]
    if args.pretrained:
        raise ValueError('--pretrained and --checkpoint both select weights: give one of them')
    models = [load_model(args, path) for path in map(resolve_run_dir, args.checkpoint)]
    if getattr(args, 'untrained', False):
        first = models[0]
        seed = first.description.seed if args.seed is None else None
        # train.py samples the same initial weights from the seed of the run
        model = _create(args, first.name, first.kwargs or {}, _DEFAULT_SEED if seed is None else seed)
        models.insert(0, LoadedModel('untrained', model, first.description, True))
    labels = [loaded.label for loaded in models]
    return [
        loaded._replace(label=f'{loaded.label} ({index})') if labels.count(loaded.label) > 1 else loaded
        for index, loaded in enumerate(models, 1)]


def load_model(args: Namespace, path: str) -> LoadedModel:
    """Load the model of a checkpoint of ``train.py``, of timm's script or of the original release.

    Raises:
        ValueError: If the file is no checkpoint, or its model is unknown or another one than ``--model``.
    """
    loaded = checkpoint.read_file(path)
    description = checkpoint.describe(loaded, path)
    state_dict, _ = select_weights(loaded, path, args.use_ema)
    name, kwargs = choose_model(args.model, description, state_dict, path)
    torch.manual_seed(_DEFAULT_SEED if args.seed is None else args.seed)
    model = create_for_checkpoint(name, _arguments(args, name, kwargs), description, state_dict, path)
    with error_prefix(path):
        checkpoint.check_finite(model.state_dict())
    epoch = description.epoch
    label = Path(path).name.split('.')[0] if epoch is None else f'epoch {epoch}'
    return LoadedModel(label, _finalize(args, model), description, False, name, kwargs)


def resolve_run_dir(path: str) -> str:
    """Return the path of the best checkpoint for the folder of a run, otherwise the path itself."""
    return str(RunDir(Path(path)).best if Path(path).is_dir() else path)


def list_snapshots(paths: List[str]) -> List[str]:
    """Return the given files; the folder of a run stands for its ``checkpoint-EPOCH.pth.tar``, sorted by epoch.

    Raises:
        ValueError: If a folder has no such file.
    """
    found: List[str] = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(str(path))
            continue
        numbered = [(re.fullmatch(r'checkpoint-(\d+)\.pth\.tar', file.name), file) for file in path.iterdir()]
        of_run = sorted((int(number[1]), str(file)) for number, file in numbered if number)
        if not of_run:
            raise ValueError(f'{path} has no checkpoint-EPOCH.pth.tar: train with --save-interval N to write them')
        found += [file for _, file in of_run]
    return found


@torch.no_grad()
def recalibrate_bn(model: Any, images: Tensor) -> None:
    """Replace the running statistics of batch norms by those of these images.

    With the initial statistics (mean 0, variance 1) the maps of large kernels vanish beside the shortcuts, unlike in
    any network during training.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.
    model.train()(images)
    model.eval()
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def load_images(args: Namespace, loaded: LoadedModel) -> InputBatch:
    """Load at most ``--num-images`` of the given images, evenly over all, as in the model's evaluation.

    Raises:
        ValueError: If there are no images, one cannot be read, or the model takes sequences.
    """
    model = loaded.model
    steps = getattr(model, 'sequence_length', None)
    if steps is not None:
        raise ValueError(
            f'{args.command} needs a network for images, and {loaded.label} takes sequences of {steps} steps: use '
            'kernels, stages or animation')
    if model.in_chans not in (1, 3):
        raise ValueError(f'images are read with 1 channel (gray) or 3 (RGB), got in_chans {model.in_chans}')
    sizes = () if args.img_size is None else ('img_size', 'input_size')  # which --img-size overrides
    stored = loaded.description.preparation(
        [key for key in PREPARATION if key not in sizes], checkpoint.MAX_INHERITED_SIDE,
        '; --img-size overrides a size')
    options = {**dict.fromkeys(PREPARATION), **stored}
    if args.img_size is not None:
        options['img_size'] = args.img_size
    config = data_config(Namespace(dataset=None, **options), model)
    transform = create_transform(
        config['input_size'], is_training=False, mean=config['mean'], std=config['std'],
        interpolation=config['interpolation'], crop_pct=config['crop_pct'], crop_mode=config['crop_mode'])
    read_image = ReadImage('L' if model.in_chans == 1 else 'RGB', bool(options.get('exif_orientation')))
    paths = args.images
    if paths is None and loaded.description.dataset == 'digits':
        paths = ['digits']
    if paths is None:
        raise ValueError("expected --images: files, folders, or 'digits' for the embedded ones")
    named = list(_read_images(paths, args.num_images, read_image))
    inputs = torch.stack([transform(image) for _, image in named])
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ('mean', 'std'))
    return InputBatch([name for name, _ in named], inputs, (inputs * std + mean).clamp(0, 1))


def _create(args: Namespace, name: str, kwargs: Dict[str, Any], seed: int, pretrained: bool = False) -> Any:
    torch.manual_seed(seed if args.seed is None else args.seed)  # for initial weights
    return _finalize(args, create_model(name, pretrained=pretrained, **_arguments(args, name, kwargs)))


def _arguments(args: Namespace, name: str, kwargs: Dict[str, Any]) -> Dict[str, Any]:
    options = Namespace(**{**vars(args), 'model': name, 'input_size': None})
    options.img_size = getattr(args, 'img_size', None)
    return model_arguments(options, kwargs)


def _finalize(args: Namespace, model: Any) -> Any:
    model = model.eval()
    return reparameterize_model(model) if args.reparam else model


def _read_images(paths: List[str], count: int, read_image: ReadImage) -> Iterable[Tuple[str, Any]]:
    if paths == ['digits']:
        digits = Digits('validation', read_image.mode)
        for index in evenly_spaced(list(range(len(digits))), count):
            image, label = digits[index]
            yield f'digit {label}', image
        return
    extensions = get_img_extensions(as_set=True)
    files: List[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob('*') if file.suffix.lower() in extensions and file.is_file())
            if not inside:
                raise ValueError(f'--images {path} has no images ({", ".join(sorted(extensions))})')
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise ValueError(f'--images {path}: no such file or folder')
    for path in evenly_spaced(files, count):
        try:
            yield path.stem, read_image(path)
        except ERRORS as error:
            raise ValueError(f'--images {path} cannot be read: {first_line(error)}') from error
