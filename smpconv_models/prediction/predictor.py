"""Predictions for files, folders and images in memory."""
import argparse
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import (
    Any,
    ClassVar,
    Dict,
    Generator,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from smpconv_models.training.cli import CheckedOptions, non_negative_int, option, positive_int
from smpconv_models.training.config import DeviceOptions, ModelOptions
from smpconv_models.training.datasets import DECODE_ERRORS, Unreadable
from smpconv_models.training.distributed import DistributedContext
from smpconv_models.training.factory import select_device
from smpconv_models.utils.errors import first_line

from .inputs import LoadedModel, ModelSource, Preparation, find_images

ImageLike = Union[str, Path, BytesIO, Image.Image, np.ndarray]
_IMAGE_TYPES = (str, Path, BytesIO, Image.Image, np.ndarray)

_LEAST_SIDE = 224  # of a heat map in pixels, smaller ones are enlarged


@dataclass(frozen=True)
class PredictOptions(CheckedOptions):
    """Options of reading images."""
    title: ClassVar[str] = 'images'

    batch_size: int = option(32, 'batch size', flags=('-b',), type=positive_int, metavar='N')
    workers: int = option(
        0, 'number of DataLoader workers (default: 0, this process reads the images)', flags=('-j',),
        type=non_negative_int, metavar='N')
    img_size: Optional[int] = option(
        None, "image side in pixels (default: the checkpoint's)", type=positive_int, metavar='N')
    exif_orientation: Optional[bool] = option(
        None, 'apply the EXIF orientation of images, or not (default: as in training)',
        action=argparse.BooleanOptionalAction)


class Prediction(NamedTuple):
    """Prediction for one image.

    Attributes:
        image: Path of the image, or ``image N`` for the N-th image, from 0, if it has no path.
        indices: Indices of the most probable classes, the most probable first; empty if the image cannot be read.
        labels: Names of these classes, ``class N`` if the names are unknown.
        probabilities: Probabilities of these classes, from 0 to 1.
        error: Reason why the image cannot be read, '' if it can.
        features: Pooled features of shape ``(num_features,)``, None unless asked for.
        heat_map: Image under its Grad-CAM heat map of the most probable class, None unless asked for.
    """
    image: str
    indices: List[int]
    labels: List[str]
    probabilities: List[float]
    error: str = ''
    features: Optional[np.ndarray] = None
    heat_map: Optional[Image.Image] = None

    def as_dict(self) -> Dict[str, Any]:
        """Return the prediction as plain data for JSON, without features and heat map."""
        if self.error:
            return {'image': self.image, 'error': self.error}
        ranked = zip(self.indices, self.labels, self.probabilities)
        return {'image': self.image, 'predictions': [
            {'index': index, 'label': label, 'probability': round(probability, 6)}
            for index, label, probability in ranked]}


class Predictor:
    """Classifier of images, with the preparation and the class names of its checkpoint.

    Args:
        loaded: Model of images in evaluation mode.
        options: Options of reading images.
        device: Device, precision and memory layout.

    Attributes:
        model: Model on its device.
        classes: Class names by index, None if they are unknown.
        label: Name of the model in messages.

    Raises:
        ValueError: If the model takes sequences or has no classifier, or the device cannot be used.
    """

    def __init__(
            self, loaded: LoadedModel, options: PredictOptions = PredictOptions(),
            device: DeviceOptions = DeviceOptions()) -> None:
        self.preparation = Preparation.of(loaded, options.img_size, options.exif_orientation)
        if loaded.model.num_classes < 1:
            raise ValueError(f'{loaded.label} has no classifier')
        self.classes = loaded.classes
        self.label = f'{loaded.name}, {loaded.label}' if loaded.name else loaded.label
        self.options = options
        self.device_options = device
        self.device = select_device(device.device)
        self.model = loaded.model.to(self.device).to(memory_format=device.memory_format)

    def predict(
            self, images: Sequence[ImageLike], topk: int = 5, features: bool = False,
            heat_maps: bool = False) -> Generator[Prediction, None, None]:
        """Yield the prediction for each image, in order.

        Args:
            images: Paths or contents of files; PIL images; arrays of shape ``(H, W)`` or ``(H, W, 3)``, uint8.
            topk: Number of classes; all of them if there are fewer.
            features: Whether to return the pooled features as well.
            heat_maps: Whether to return heat maps as well, which needs the grad-cam package.

        Raises:
            ImportError: If heat maps are asked for, and the package is not installed.
            ValueError: If an image is of another type, ``topk`` is not positive, the model cannot take the images, or
                has no finite logits.
        """
        for image in images:
            _check_type(image)
        if not isinstance(topk, int) or topk < 1:
            raise ValueError(f'topk must be an integer of at least 1, got {topk!r}')
        world = DistributedContext()
        loader = world.bounded_loader(DataLoader(
            _Images(images, self.preparation), self.options.batch_size, num_workers=self.options.workers,
            persistent_workers=self.options.workers > 0, collate_fn=_collate,
            worker_init_fn=world.worker_init_fn), self.device_options.dist_timeout)
        try:
            for inputs, unreadable in loader:
                readable = iter(() if inputs is None else self._predict_batch(inputs, topk, features, heat_maps))
                for name, error in unreadable:
                    yield Prediction(name, [], [], [], error) if error else next(readable)._replace(image=name)
        finally:
            world.close_loaders()

    def _predict_batch(
            self, inputs: Tensor, topk: int, with_features: bool, with_heat_maps: bool) -> Iterator[Prediction]:
        images = inputs.to(self.device, memory_format=self.device_options.memory_format)
        try:
            with torch.inference_mode(), self.device_options.autocast(self.device):
                maps = self.model.forward_features(images)
                features = self.model.forward_head(maps, pre_logits=True) if with_features else None
                logits = self.model.forward_head(maps)
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError) as error:  # networks report an unsupported size by these
            raise ValueError(
                f'{self.label} cannot take images of {tuple(inputs.shape[1:])}: {first_line(error)}') from error
        if not logits.isfinite().all():
            raise ValueError(f'the logits of {self.label} are not finite')
        probabilities, indices = (
            values.tolist() for values in logits.float().softmax(1).topk(min(topk, logits.shape[1])))
        heat_maps = self._heat_maps(images, [row[0] for row in indices]) if with_heat_maps else []
        for row, values in enumerate(indices):
            yield Prediction(
                '', values, [self._name(index) for index in values], probabilities[row], '',
                None if features is None else features[row].float().cpu().numpy(),
                heat_maps[row] if heat_maps else None)

    def _name(self, index: int) -> str:
        return f'class {index}' if self.classes is None else self.classes[index]

    def _heat_maps(self, images: Tensor, indices: List[int]) -> List[Image.Image]:
        from smpconv_models import figures  # imported here, as predictions do not need matplotlib
        maps = figures.heat_maps(self.model, images, classes=indices)
        pixels = self.preparation.pixels(images.cpu()).numpy()
        pictures = []
        for image, heat in zip(pixels, maps):
            picture = Image.fromarray((255 * figures.overlay_heat_map(image.mean(0), heat)).round().astype(np.uint8))
            scale = -(-_LEAST_SIDE // min(picture.size))
            pictures.append(picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST))
        return pictures


def _check_type(image: Any) -> None:
    if not isinstance(image, _IMAGE_TYPES):
        raise ValueError(f'expected a path, a PIL image or an array of uint8, got {type(image).__name__}')
    if isinstance(image, np.ndarray) and (
            image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3)):
        raise ValueError(
            f'expected an array of shape (H, W) or (H, W, 3) of uint8, got {image.shape} of {image.dtype}')


class _Images(Dataset):
    """Prepared images and their names, or the reason in place of an image that cannot be read."""

    def __init__(self, images: Sequence[ImageLike], preparation: Preparation) -> None:
        self.images = images
        self.preparation = preparation

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Union[Tuple[str, Tensor], Unreadable]:
        image = self.images[index]
        name = str(image) if isinstance(image, (str, Path)) else f'image {index}'
        try:
            if isinstance(image, np.ndarray):
                image = Image.fromarray(image)
            read = self.preparation.read
            image = read.convert(image) if isinstance(image, Image.Image) else read(image)
            return name, self.preparation.transform(image)
        except UnidentifiedImageError:  # its message is the path again
            return Unreadable(name, 'not an image of a known format')
        except DECODE_ERRORS as error:
            return Unreadable.from_error(name, error)


def _collate(samples: List[Any]) -> Tuple[Optional[Tensor], List[Tuple[str, str]]]:
    """Return the batch of the readable images, None if there is none, and each image's name and error."""
    tensors = [sample[1] for sample in samples if not isinstance(sample, Unreadable)]
    names = [(sample[0], sample.reason if isinstance(sample, Unreadable) else '') for sample in samples]
    return torch.stack(tensors) if tensors else None, names


def predict(
        images: Union[ImageLike, Iterable[ImageLike]], checkpoint: Union[str, Path], topk: int = 5, *,
        model: Optional[str] = None, use_ema: Optional[bool] = None, img_size: Optional[int] = None,
        exif_orientation: Optional[bool] = None, device: Optional[str] = None, batch_size: int = 32, workers: int = 0,
        features: bool = False, heat_maps: bool = False) -> List[Prediction]:
    """Return the most probable classes of images.

    For several calls, create a :class:`Predictor` once.

    Args:
        images: Path of a file or a folder, PIL image or array ``(H, W[, 3])`` of uint8, or an iterable of them.
        checkpoint: Path of a checkpoint, of a run's folder or of a converted folder, or ``hf-hub:OWNER/NAME``.
        topk: Number of classes; all of them if there are fewer.
        model: Name of the model, by default the one that the checkpoint describes or fits.
        use_ema: Whether to use the EMA weights, by default the better ones if recorded in the checkpoint.
        img_size: Image side in pixels, by default as in training.
        exif_orientation: Whether to apply the EXIF orientation of images, by default as in training.
        device: Device, by default the GPU if there is one, otherwise the CPU.
        batch_size: Batch size.
        workers: Number of DataLoader workers.
        features: Whether to return the pooled features as well.
        heat_maps: Whether to return Grad-CAM heat maps as well, which needs ``smpconv_models[figures]``.

    Returns:
        A prediction for each image, in order. An image that cannot be read has an ``error`` and no classes.

    Raises:
        ImportError: If heat maps are asked for, and the grad-cam package is not installed.
        ValueError: If there is no such file or model, or if the model cannot take the images.
    """
    if not isinstance(checkpoint, (str, Path)):
        raise ValueError(
            f'checkpoint must be a path or hf-hub:OWNER/NAME, got {type(checkpoint).__name__}; for a model in '
            'memory, use Predictor')
    if not isinstance(images, (*_IMAGE_TYPES, Iterable)):
        _check_type(images)
    source = ModelSource(ModelOptions(model=model), [str(checkpoint)], use_ema=use_ema, img_size=img_size)
    predictor = Predictor(
        source.load()[0], PredictOptions(batch_size, workers, img_size, exif_orientation), DeviceOptions(device=device))
    several: List[ImageLike] = []
    for image in [images] if isinstance(images, _IMAGE_TYPES) else images:
        several += find_images([str(image)]) if isinstance(image, (str, Path)) else [image]
    return list(predictor.predict(several, topk, features, heat_maps))
