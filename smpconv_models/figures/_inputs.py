"""The networks and images that the command line names."""
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
from smpconv_models.data.digits import Digits
from smpconv_models.training.config import DataOptions
from smpconv_models.training.datasets import DECODE_ERRORS, ReadImage
from smpconv_models.training.model_factory import (
    choose_model,
    create_for_checkpoint,
    create_model,
    model_arguments,
    select_weights,
)
from smpconv_models.training.run_dir import RunDir
from smpconv_models.training.tasks import ImageTask
from smpconv_models.utils.errors import first_line

from .kernels import evenly


class Network(NamedTuple):
    """A network to look into.

    Attributes:
        label: What to call it.
        model: In evaluation mode.
        described: Description in its checkpoint; empty without.
        is_random: Whether its weights are initial ones.
        name: Name of the model.
        kwargs: Arguments of its constructor from the checkpoint.
    """
    label: str
    model: Any
    described: checkpoint.Description
    is_random: bool = False
    name: str = ''
    kwargs: Optional[Dict[str, Any]] = None

    @property
    def classes(self) -> Optional[List[str]]:
        """Names of the classes, None if the checkpoint has none."""
        return self.described.classes


class Images(NamedTuple):
    """Images as a network takes them.

    Attributes:
        names: Of files or of digits.
        inputs: ``(N, C, H, W)``.
        pixels: The same in [0, 1], to look at.
    """
    names: List[str]
    inputs: Tensor
    pixels: Tensor


def networks(args: Namespace) -> List[Network]:
    """Those of the checkpoints, or the one that is named; with ``--untrained`` one more, before the others.

    Raises:
        ValueError: There is no such file or model, or they don't fit each other.
    """
    if args.checkpoint is None:
        if args.model is None:
            raise ValueError('expected --checkpoint or --model')
        if getattr(args, 'untrained', False):
            raise ValueError('--untrained is for --checkpoint; --model without --pretrained has random weights')
        label = args.model if args.pretrained else f'{args.model}, untrained'
        model = _finished(_create(args, args.model, {}, args.pretrained), args)
        return [Network(label, model, checkpoint.Description(), not args.pretrained)]
    if args.pretrained:
        raise ValueError('--pretrained and --checkpoint both say which weights')
    found = [from_file(args, path) for path in map(best_of, args.checkpoint)]
    if getattr(args, 'untrained', False):
        first = found[0]
        seed = first.described.seed if args.seed is None else None  # train.py samples the same weights from it
        model = _create(args, first.name, first.kwargs or {}, seed=42 if seed is None else seed)
        found.insert(0, Network('untrained', _finished(model, args), first.described, True))
    return _told_apart(found)


@torch.no_grad()
def settle_norms(model: Any, images: Tensor) -> None:
    """Gives batch norms the statistics of these images.

    Those of a new network (mean 0, variance 1) let the maps of large kernels vanish beside what bypasses them, which no
    network in training does.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.
    model.train()(images)
    model.eval()
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def best_of(path: str) -> str:
    """The file, or the best checkpoint where it is a run's folder."""
    return str(RunDir(Path(path)).best if Path(path).is_dir() else path)


def snapshots_of(paths: List[str]) -> List[str]:
    """The files as they are given; of a run's folder its ``checkpoint-EPOCH.pth.tar``, by epoch.

    Raises:
        ValueError: A folder has none.
    """
    found: List[str] = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(str(path))
            continue
        numbered = [(re.fullmatch(r'checkpoint-(\d+)\.pth\.tar', file.name), file) for file in path.iterdir()]
        of_run = sorted((int(number[1]), str(file)) for number, file in numbered if number)
        if not of_run:
            raise ValueError(
                f'{path} has no checkpoint-EPOCH.pth.tar: train.py --snapshot-interval N keeps one each N epochs')
        found += [file for _, file in of_run]
    return found


def from_file(args: Namespace, path: str) -> Network:
    """The network of a checkpoint of ``train.py``, of timm's script or of the original release.

    Raises:
        ValueError: It is no checkpoint, of no known model, or of another one than is named.
    """
    loaded = checkpoint.read_file(path)
    described = checkpoint.describe(loaded, path)
    state_dict, _ = select_weights(loaded, path, args.use_ema)
    name, kwargs = choose_model(args.model, described, state_dict, path)
    torch.manual_seed(42 if args.seed is None else args.seed)
    model = create_for_checkpoint(name, _arguments(args, name, kwargs), described, state_dict, path)
    try:
        checkpoint.check_finite(model.state_dict())
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    return Network(_label(path, described), _finished(model, args), described, False, name, kwargs)


def _create(args: Namespace, name: str, kwargs: Dict[str, Any], pretrained: bool = False, seed: int = 42) -> Any:
    torch.manual_seed(seed if args.seed is None else args.seed)  # of a network without weights
    return create_model(name, pretrained=pretrained, **_arguments(args, name, kwargs))


def _arguments(args: Namespace, name: str, kwargs: Dict[str, Any]) -> Dict[str, Any]:
    options = Namespace(**{**vars(args), 'model': name, 'input_size': None})
    options.img_size = getattr(args, 'img_size', None)
    return model_arguments(options, kwargs)


def _finished(model: Any, args: Namespace) -> Any:
    model = model.eval()
    return reparameterize_model(model) if args.reparam else model


def _label(path: str, described: checkpoint.Description) -> str:
    """Return the epoch of the weights, or the file's name if the checkpoint has no epoch."""
    epoch = described.epoch
    return Path(path).name.split('.')[0] if epoch is None else f'epoch {epoch}'


def _told_apart(found: List[Network]) -> List[Network]:
    labels = [network.label for network in found]
    return [
        network._replace(label=f'{network.label} ({index + 1})') if labels.count(network.label) > 1 else network
        for index, network in enumerate(found)]


def images(args: Namespace, network: Network) -> Images:
    """At most ``--num-images`` of those named, evenly over all, made ready as for the network's evaluation.

    Raises:
        ValueError: There are none, or one can't be read; the network takes sequences.
    """
    model: Any = network.model
    steps = getattr(model, 'sequence_length', None)
    if steps is not None:
        raise ValueError(
            f'{args.command} is for networks of images, and {network.label} takes sequences of {steps} steps: expected '
            'kernels, stages or animation')
    if model.in_chans not in (1, 3):
        raise ValueError(f'images are read with 1 channel (gray) or 3 (RGB), got in_chans {model.in_chans}')
    described = network.described
    sizes = () if args.img_size is None else ('img_size', 'input_size')  # which the user's option overrides
    given = described.preparation(
        [key for key in PREPARATION if key not in sizes], checkpoint.MAX_INHERITED_SIDE,
        '; --img-size overrides a size')
    options = {**dict.fromkeys(PREPARATION), **given}
    if args.img_size is not None:
        options['img_size'] = args.img_size
    config = ImageTask(DataOptions(**options)).resolve_data_config(model)
    transform = create_transform(
        config['input_size'], is_training=False, mean=config['mean'], std=config['std'],
        interpolation=config['interpolation'], crop_pct=config['crop_pct'], crop_mode=config['crop_mode'])
    exif_orientation = bool(options.get('exif_orientation'))
    read_image = ReadImage('L' if model.in_chans == 1 else 'RGB', exif_orientation)
    named = list(_named(args, described.dataset, read_image))
    inputs = torch.stack([transform(image) for _, image in named])
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ('mean', 'std'))
    return Images([name for name, _ in named], inputs, (inputs * std + mean).clamp(0, 1))


def _named(args: Namespace, trained_on: Optional[str], read_image: ReadImage) -> Iterable[Tuple[str, Any]]:
    if args.images == ['digits'] or (args.images is None and trained_on == 'digits'):
        digits = Digits('validation', read_image.mode)
        for index in evenly(list(range(len(digits))), args.num_images):
            image, label = digits[index]
            yield f'digit {label}', image
        return
    if args.images is None:
        raise ValueError("expected --images: files, folders, or 'digits' for the embedded ones")
    for path in evenly(_files(args.images), args.num_images):
        yield path.stem, _read(path, read_image)


def _files(paths: List[str]) -> List[Path]:
    endings = get_img_extensions(as_set=True)
    found: List[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob('*') if file.suffix.lower() in endings and file.is_file())
            if not inside:
                raise ValueError(f'--images {path} has no images ({", ".join(sorted(endings))})')
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise ValueError(f'--images {path}: no such file or folder')
    return found


def _read(path: Path, read_image: ReadImage) -> Any:
    try:
        return read_image(path)
    except DECODE_ERRORS as error:
        raise ValueError(f'--images {path} cannot be read: {first_line(error)}') from error
