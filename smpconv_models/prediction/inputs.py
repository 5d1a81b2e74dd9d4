"""Models, and images in the form that they take, for predictions and figures."""
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, NoReturn, Optional

import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset
from timm.utils import reparameterize_model
from torch import Tensor

from smpconv_models import checkpoint
from smpconv_models.checkpoint.description import PREPARATION, check_texts
from smpconv_models.training.checkpointing import RunDir
from smpconv_models.training.config import DataOptions, ModelOptions
from smpconv_models.training.datasets import ReadImage
from smpconv_models.training.factory import create_model, model_arguments, open_checkpoint
from smpconv_models.training.tasks import ImageTask
from smpconv_models.utils.errors import error_prefix

_DEFAULT_SEED = 42

# Formats that Pillow recognizes, and decodes only by another program or library.
_UNDECODABLE = ('BUFR', 'EPS', 'GRIB', 'HDF5', 'MPEG', 'WMF')


class LoadedModel(NamedTuple):
    """Model in evaluation mode."""
    label: str  # in plots and messages
    model: Any
    description: checkpoint.Description  # empty without a checkpoint
    is_random: bool = False  # whether its weights are initial ones
    name: str = ''
    kwargs: Optional[Dict[str, Any]] = None  # the constructor's, from the checkpoint

    @property
    def classes(self) -> Optional[List[str]]:
        """Class names by index: the checkpoint's, the repository's, otherwise ImageNet's by the number of classes.

        A ValueError if the number of names differs from the number of classes.
        """
        names = self.description.classes
        if names is None:
            names = self.model.pretrained_cfg.get('label_names')
            names = None if names is None else check_texts(f'{self.label}: label_names', names)
        subset = infer_imagenet_subset(self.model) if names is None else None
        if subset is not None:
            info = ImageNetInfo(subset)
            names = [info.index_to_description(index) for index in range(info.num_classes())]
        if names is not None and len(names) != self.model.num_classes:
            raise ValueError(f'{self.label}: expected {self.model.num_classes} class names, got {len(names)}')
        return names


@dataclass(frozen=True)
class ModelSource:
    """Source of models: checkpoints, or a name."""
    model: ModelOptions = ModelOptions()
    # paths of files, run folders or converted folders, hf-hub:OWNER/NAME or local-dir:FOLDER; None for the named model
    checkpoints: Optional[List[str]] = None
    pretrained: bool = False  # of the named model
    untrained: bool = False  # put a random model first
    use_ema: Optional[bool] = None  # whether to use the EMA weights; by default the better ones if recorded
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
        models = [self._load_checkpoint(path) for path in self.checkpoints]
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

    def _load_checkpoint(self, path: str) -> LoadedModel:
        if (Path(path) / 'config.json').is_file():  # of hub/convert.py
            path = f'local-dir:{path}'
        if path.partition(':')[0] not in ('hf-hub', 'local-dir'):
            return self.load_file(RunDir.best_checkpoint(path))
        if self.untrained or self.use_ema is not None:
            raise ValueError(f'--untrained and --use-ema need a checkpoint of a training run, got {path}')
        for name in ('model', 'num_classes', 'in_chans'):  # timm would create another classifier at random
            if getattr(self.model, name) is not None or name in self.model.model_kwargs:
                raise ValueError(f'{path} describes its model: leave out --{name.replace("_", "-")}')
        named = replace(self, model=replace(self.model, model=path), checkpoints=None, pretrained=True)
        return named.load()[0]

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


class Preparation(NamedTuple):
    """Preparation of images as in a model's evaluation."""
    read: ReadImage
    transform: Callable[[Image.Image], Tensor]
    mean: Tensor  # of shape (C, 1, 1)
    std: Tensor

    @classmethod
    def of(cls, loaded: LoadedModel, img_size: Optional[int] = None,
           exif_orientation: Optional[bool] = None) -> 'Preparation':
        """Return the preparation that a checkpoint or a model describes.

        Args:
            loaded: Model of images.
            img_size: Image side in pixels, by default the described one.
            exif_orientation: Whether to apply the EXIF orientation of images, by default as in training.

        Raises:
            ValueError: If the model takes sequences, or images of other channels than 1 or 3.
        """
        model = loaded.model
        steps = getattr(model, 'sequence_length', None)
        if steps is not None:
            raise ValueError(f'expected a network for images, and {loaded.label} takes sequences of {steps} steps')
        if model.in_chans not in (1, 3):
            raise ValueError(f'images are read with 1 channel (gray) or 3 (RGB), got in_chans {model.in_chans}')
        sizes = () if img_size is None else ('img_size', 'input_size')  # which --img-size overrides
        options: Dict[str, Any] = dict.fromkeys(PREPARATION)
        options.update(loaded.description.preparation(
            [key for key in PREPARATION if key not in sizes], checkpoint.MAX_INHERITED_SIDE,
            '; --img-size overrides a size'))
        given = {'img_size': img_size, 'exif_orientation': exif_orientation}
        options.update({key: value for key, value in given.items() if value is not None})
        config = ImageTask(DataOptions(**options)).resolve_data_config(model)
        transform = create_transform(
            config['input_size'], is_training=False, mean=config['mean'], std=config['std'],
            interpolation=config['interpolation'], crop_pct=config['crop_pct'], crop_mode=config['crop_mode'])
        mean, std = (torch.tensor(config[key])[:, None, None] for key in ('mean', 'std'))
        return cls(ReadImage('L' if model.in_chans == 1 else 'RGB', bool(options['exif_orientation'])), transform,
                   mean, std)

    def pixels(self, inputs: Tensor) -> Tensor:
        """Return prepared images ``(N, C, H, W)`` in [0, 1], for display."""
        return (inputs * self.std + self.mean).clamp(0, 1)


def find_images(paths: Iterable[str], option: str = 'images') -> List[Path]:
    """Return the given files and the images in the given folders, by their names' extensions, sorted in each folder.

    Hidden files and folders in a folder are left out.

    Args:
        paths: Paths of files and folders.
        option: Name of the argument, for errors.

    Raises:
        ValueError: If there is no such file or folder, a folder cannot be read, or there is no image in it.
    """
    files: List[Path] = []
    extensions = _extensions()
    for name in paths:
        path = Path(name)
        if os.path.isdir(name):     # not of Path, for which '' is the current folder
            inside = sorted(file for file in _files(path, option) if file.suffix.lower() in extensions)
            if not inside:
                raise ValueError(f'{option}: no file in {path} has the extension of an image')
            files += inside
        elif os.path.exists(name):
            files.append(path)
        else:
            raise ValueError(f'{option}: no such file or folder: {name or "an empty path"}')
    return files


def _files(folder: Path, option: str) -> Iterator[Path]:
    """Yield the files of a folder and its subfolders; raise ValueError for one that cannot be read."""
    def fail(error: OSError) -> NoReturn:
        raise ValueError(f'{option}: {error.filename} cannot be read: {error.strerror}')
    for path, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith('.')]
        for file in (Path(path, name) for name in names if not name.startswith('.')):
            if file.is_file():
                yield file


def _extensions() -> List[str]:
    """Return the extensions of the formats that Pillow decodes by itself."""
    return [
        extension for extension, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in _UNDECODABLE]
