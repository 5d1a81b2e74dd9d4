"""Models and images given on the command line."""
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Tuple

import torch
from timm.data import create_transform, get_img_extensions
from timm.utils import reparameterize_model
from torch import Tensor

from smpconv_models import checkpoint
from smpconv_models.checkpoint.description import PREPARATION
from smpconv_models.data.images import Digits
from smpconv_models.training.checkpointing import RunDir
from smpconv_models.training.config import DataOptions, ModelOptions
from smpconv_models.training.datasets import DECODE_ERRORS, ReadImage
from smpconv_models.training.factory import create_model, model_arguments, open_checkpoint
from smpconv_models.training.tasks import ImageTask
from smpconv_models.utils.errors import first_line

from .kernels import error_prefix, evenly_spaced

_DEFAULT_SEED = 42


class LoadedModel(NamedTuple):
    """Model to plot."""
    label: str  # in plots and messages
    model: Any  # in evaluation mode
    description: checkpoint.Description  # empty without a checkpoint
    is_random: bool = False  # whether its weights are initial ones
    name: str = ''
    kwargs: Optional[Dict[str, Any]] = None  # the constructor's, from the checkpoint


class InputBatch(NamedTuple):
    """Images in the form that a model takes."""
    names: List[str]  # of the files or digits
    inputs: Tensor  # normalized images, ``(N, C, H, W)``
    pixels: Tensor  # the same images in [0, 1], for display


@dataclass(frozen=True)
class ModelSource:
    """Source of models: checkpoints, or a name."""
    model: ModelOptions = ModelOptions()
    checkpoints: Optional[List[str]] = None  # paths of files or run folders, None for the named model
    pretrained: bool = False  # of the named model
    untrained: bool = False  # put a random model first
    use_ema: Optional[bool] = None  # EMA weights; by default unless the checkpoint says that the model's were better
    reparam: bool = False
    seed: Optional[int] = None  # seed of random weights, by default that of the checkpoint's run, otherwise 42
    img_size: Optional[int] = None  # image side in pixels, by default the model's

    def load(self) -> List[LoadedModel]:
        """Load the checkpoints' models, or create the named one; raise ValueError if one does not exist or fit."""
        if self.checkpoints is None:
            name = self.model.model
            if name is None:
                raise ValueError('expected --checkpoint or --model')
            if self.untrained:
                raise ValueError('--untrained needs --checkpoint; --model without --pretrained has random weights')
            label = name if self.pretrained else f'{name}, untrained'
            return [LoadedModel(label, self._create(name, {}, None), checkpoint.Description(), not self.pretrained)]
        if self.pretrained:
            raise ValueError('--pretrained and --checkpoint both select weights: give one of them')
        models = [self.load_file(path) for path in map(RunDir.best_checkpoint, self.checkpoints)]
        if self.untrained:
            first = models[0]
            # train.py samples the same initial weights from the seed of the run
            seed = first.description.seed if self.seed is None else None
            model = self._create(first.name, first.kwargs or {}, seed)
            models.insert(0, LoadedModel('untrained', model, first.description, True))
        labels = [loaded.label for loaded in models]
        return [
            loaded._replace(label=f'{loaded.label} ({index})') if labels.count(loaded.label) > 1 else loaded
            for index, loaded in enumerate(models, 1)]

    def load_file(self, path: str) -> LoadedModel:
        """Load the model of a checkpoint of ``train.py``, of timm's script or of the original release.

        A model that is unknown, or another one than ``--model``, is a ValueError.
        """
        opened = open_checkpoint(path, self.model.model, self.use_ema)
        torch.manual_seed(_DEFAULT_SEED if self.seed is None else self.seed)
        model = opened.create(self._arguments(opened.name, opened.kwargs))
        with error_prefix(path):
            checkpoint.check_finite(model.state_dict())
        epoch = opened.described.epoch
        label = Path(path).name.split('.')[0] if epoch is None else f'epoch {epoch}'
        return LoadedModel(label, self._finalize(model), opened.described, False, opened.name, opened.kwargs)

    def _create(self, name: str, kwargs: Dict[str, Any], seed: Optional[int]) -> Any:
        seeds = [value for value in (self.seed, seed, _DEFAULT_SEED) if value is not None]
        torch.manual_seed(seeds[0])  # for initial weights
        return self._finalize(create_model(name, pretrained=self.pretrained, **self._arguments(name, kwargs)))

    def _arguments(self, name: str, kwargs: Dict[str, Any]) -> Dict[str, Any]:
        return model_arguments(replace(self.model, model=name), self.img_size, None, kwargs)

    def _finalize(self, model: Any) -> Any:
        return reparameterize_model(model.eval()) if self.reparam else model.eval()


def list_snapshots(paths: List[str]) -> List[str]:
    """Return the given files; the folder of a run stands for its ``checkpoint-EPOCH.pth.tar``, sorted by epoch."""
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


def load_images(
        loaded: LoadedModel, images: Optional[List[str]], num_images: int, img_size: Optional[int]) -> InputBatch:
    """Load images as in a model's evaluation, at most ``num_images``, evenly chosen from all.

    Args:
        images: Paths of files and folders, or 'digits'; None for the digits if the model was trained on them.
        img_size: Image side in pixels, by default the model's.

    Raises:
        ValueError: If there are no images, one cannot be read, or the model takes sequences.
    """
    model = loaded.model
    steps = getattr(model, 'sequence_length', None)
    if steps is not None:
        raise ValueError(
            f'this plot needs a network for images, and {loaded.label} takes sequences of {steps} steps: use kernels, '
            'stages or animation')
    if model.in_chans not in (1, 3):
        raise ValueError(f'images are read with 1 channel (gray) or 3 (RGB), got in_chans {model.in_chans}')
    sizes = () if img_size is None else ('img_size', 'input_size')  # which --img-size overrides
    stored = loaded.description.preparation(
        [key for key in PREPARATION if key not in sizes], checkpoint.MAX_INHERITED_SIDE,
        '; --img-size overrides a size')
    options = {**dict.fromkeys(PREPARATION), **stored}
    if img_size is not None:
        options['img_size'] = img_size
    config = ImageTask(DataOptions(**options)).resolve_data_config(model)
    transform = create_transform(
        config['input_size'], is_training=False, mean=config['mean'], std=config['std'],
        interpolation=config['interpolation'], crop_pct=config['crop_pct'], crop_mode=config['crop_mode'])
    read_image = ReadImage('L' if model.in_chans == 1 else 'RGB', bool(options.get('exif_orientation')))
    if images is None and loaded.description.text('dataset') == 'digits':
        images = ['digits']
    if images is None:
        raise ValueError("expected --images: files, folders, or 'digits' for the embedded ones")
    named = list(_read_images(images, num_images, read_image))
    inputs = torch.stack([transform(image) for _, image in named])
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ('mean', 'std'))
    return InputBatch([name for name, _ in named], inputs, (inputs * std + mean).clamp(0, 1))


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
        except DECODE_ERRORS as error:
            raise ValueError(f'--images {path} cannot be read: {first_line(error)}') from error
