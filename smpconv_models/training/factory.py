"""Devices, models, and the parts of a run that come from timm and PyTorch: optimizer, schedule, EMA, Mixup, loss."""
import copy
import logging
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import timm
import torch
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import PretrainedCfg
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from smpconv_models import checkpoint
from smpconv_models.checkpoint import Description
from smpconv_models.layers import smp_layers
from smpconv_models.models import (
    architecture_hint,
    check_network,
    create_sequence_model,
    identify,
    list_sequence_models,
)
from smpconv_models.utils import hub_download
from smpconv_models.utils.errors import first_line, suggestion_suffix

from .batch_norm import frozen_modules
from .checkpointing import RunDir
from .config import AugmentationOptions, EMAOptions, ModelOptions, OptimizerOptions, ScheduleOptions
from .distributed import DistributedContext

_logger = logging.getLogger(__name__)


def param_groups(
        model: Any, weight_decay: float, layer_decay: Optional[float] = None,
        radius_lr_scale: float = 0.1) -> List[Dict[str, Any]]:
    """Return timm's parameter groups, with the radii of the points in groups of their own at a lower learning rate.

    No weight decay is applied to 1-D parameters, biases, coordinates, radii, and the parameters that the model's
    ``no_weight_decay()`` lists. Learning rates are relative, under ``lr_scale``, by which timm's schedulers multiply.

    Args:
        model: Any model; without SMP layers the groups are timm's.
        weight_decay: Weight decay of the other parameters.
        layer_decay: Factor of the learning rate from each layer to the one before it; None for one learning rate.
        radius_lr_scale: Learning rate of the radii relative to their layer's other parameters (0.1 in the paper, A.1).
    """
    layers = smp_layers(model).values()
    radii = {id(layer.radius) for layer in layers}
    undecayed = radii | {id(layer.coords) for layer in layers}
    # found by module, as a wrapper (features_only) has no no_weight_decay()
    no_decay = {name for name, param in model.named_parameters() if id(param) in undecayed}
    if hasattr(model, 'no_weight_decay'):
        no_decay |= set(model.no_weight_decay())
    if layer_decay is None:
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=no_decay)
    else:
        groups = param_groups_layer_decay(
            model, weight_decay, layer_decay=layer_decay, no_weight_decay_list=no_decay)
    split = []
    for group in groups:
        for is_radius in (False, True):
            params = [param for param in group['params'] if (id(param) in radii) == is_radius]
            if params:
                scale = group.get('lr_scale', 1.) * (radius_lr_scale if is_radius else 1.)
                split.append({**group, 'params': params, 'lr_scale': scale})
    return split


def create_optimizer(options: OptimizerOptions, model: nn.Module) -> torch.optim.Optimizer:
    """Create timm's optimizer over the paper's parameter groups.

    Raises:
        ValueError: If timm has no optimizer of this name, or the optimizer does not accept the options.
    """
    groups = param_groups(model, options.weight_decay, options.layer_decay)
    given: Dict[str, Any] = {
        key: value for key, value in (('eps', options.opt_eps), ('betas', options.opt_betas)) if value is not None}
    try:
        trial = create_optimizer_v2([nn.Parameter(torch.zeros(1, 1))], opt=options.opt, lr=options.lr)
        if getattr(trial, 'is_second_order', False):
            raise ValueError('the optimizer takes second derivatives, which a step does not compute here')
        for key, value in given.items():
            if key not in trial.defaults:  # timm drops it without a word
                _logger.warning('--opt %s has no %s: --opt-%s %s is ignored', options.opt, key, key, value)
        betas = trial.defaults.get('betas')
        if options.opt_betas is not None and betas is not None and len(options.opt_betas) != len(betas):
            raise ValueError(f'expected {len(betas)} --opt-betas, got {len(options.opt_betas)}')
        return create_optimizer_v2(
            groups, opt=options.opt, lr=options.lr, weight_decay=options.weight_decay, momentum=options.momentum,
            **given)
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        known: Any = list_optimizers()
        hint = '' if options.opt in known else suggestion_suffix(options.opt, known)
        raise ValueError(
            f'--opt {options.opt} with {given or "its defaults"} cannot be created: {error}{hint}') from error


def create_scheduler(options: ScheduleOptions, optimizer: torch.optim.Optimizer, epochs: int, steps: int) -> Any:
    """Create timm's scheduler, stepped once per optimizer update.

    Args:
        options: Options of the schedule.
        optimizer: Optimizer to schedule.
        epochs: Number of epochs.
        steps: Number of steps of an epoch.
    """
    scheduler, _ = create_scheduler_v2(
        optimizer, sched=options.sched, num_epochs=epochs, warmup_epochs=options.warmup_epochs,
        warmup_lr=options.warmup_lr, min_lr=options.min_lr, decay_epochs=options.decay_epochs,
        decay_rate=options.decay_rate, step_on_epochs=False, updates_per_epoch=steps)
    return scheduler


def create_ema(options: EMAOptions, model: nn.Module) -> Optional[ModelEmaV3]:
    """Create the EMA of the weights, if the options ask for it."""
    if not options.model_ema:
        return None
    return ModelEmaV3(model, decay=options.model_ema_decay, use_warmup=bool(options.model_ema_warmup))


def create_mixup(options: AugmentationOptions, num_classes: Any) -> Optional[Mixup]:
    """Create Mixup and CutMix, if the options ask for either."""
    if options.mixup <= 0 and options.cutmix <= 0:
        return None
    return Mixup(
        mixup_alpha=options.mixup, cutmix_alpha=options.cutmix, prob=options.mixup_prob,
        switch_prob=options.mixup_switch_prob, mode=options.mixup_mode, label_smoothing=options.smoothing,
        num_classes=num_classes)


def create_loss(mixup: Optional[Mixup], smoothing: float) -> nn.Module:
    """Create the cross-entropy for class indices, or for the soft targets of Mixup."""
    if mixup is not None:
        return SoftTargetCrossEntropy()  # Mixup smooths the labels itself
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()


def classifier_parameters(model: Any) -> List[nn.Parameter]:
    """Return the parameters of a timm model's classifier, or of its classifiers: distilled models have two."""
    found = model.get_classifier()
    return [parameter for part in (found if isinstance(found, tuple) else (found,)) for parameter in part.parameters()]


def freeze_(model: Any, names: str) -> None:
    """Exclude modules from training: their weights, and the running statistics of their batch norms, stay.

    Args:
        model: Model to change.
        names: Names of modules as in ``named_modules``, with commas between them; ``backbone`` stands for all
            parameters but the classifier's.

    Raises:
        ValueError: If there is no such module, or nothing is left to train.
    """
    for name in names.split(','):
        if name == 'backbone':
            classifier = {id(parameter) for parameter in classifier_parameters(model)}
            frozen = [parameter for parameter in model.parameters() if id(parameter) not in classifier]
        else:
            try:
                frozen = list(model.get_submodule(name).parameters() if name else [])
            except AttributeError:
                frozen = []
        if not frozen:
            modules = [module for module, _ in model.named_modules()]
            raise ValueError(
                f'--freeze {name}: no module of this name with weights; there are backbone, '
                f'{", ".join(child for child, _ in model.named_children())}{suggestion_suffix(name, modules)}')
        for parameter in frozen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f'--freeze {names} leaves nothing to train')


def set_train_mode(model: nn.Module) -> None:
    """Set a model to training mode, except for its modules whose weights are all frozen."""
    model.train()
    for module in frozen_modules(model):
        module.eval()


def convert_sync_bn(model: nn.Module, world: DistributedContext, device: torch.device) -> nn.Module:
    """Synchronize a model's batch norms over all ranks; unchanged, with a warning, on a CPU."""
    if world.size == 1:
        return model
    if device.type == 'cpu':
        if world.is_primary:
            _logger.warning(
                '--sync-bn is ignored: PyTorch synchronizes batch norms on GPUs only; each rank normalizes over its '
                'own images')
        return model
    return convert_sync_batchnorm(model)


def wrap_model(model: nn.Module, torchcompile: Optional[str], world: DistributedContext, device: torch.device) -> Any:
    """Wrap a model for distributed training and compilation."""
    wrapped: Any = model
    if world.size > 1:
        wrapped = DistributedDataParallel(model, device_ids=None if device.type == 'cpu' else [device])
    return torch.compile(wrapped, backend=torchcompile) if torchcompile else wrapped


# --- devices and models ---


# Sources of models with a configuration of their own, by timm's names.
_SOURCES = ('hf-hub', 'local-dir')


def select_device(name: Optional[str], local_rank: Optional[int] = None) -> torch.device:
    """Return the named device, by default the GPU if there is one, otherwise the CPU.

    Args:
        name: PyTorch's name of the device.
        local_rank: Rank on this machine if there are several, each of which takes the GPU of its number.

    Raises:
        ValueError: If the device cannot be used.
    """
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    if name == 'cuda' and local_rank is not None:
        name = f'cuda:{local_rank}'
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f'--device {name} cannot be used: {first_line(error)}') from error
    return device


def model_arguments(
        model: ModelOptions, img_size: Optional[int], input_size: Optional[List[int]],
        defaults: Dict[str, Any]) -> Dict[str, Any]:
    """Return the arguments of a model's constructor: the options, over ``defaults`` for what they leave open.

    Args:
        model: Options of the network.
        img_size: Image side, for models of a fixed size.
        input_size: (channels, height, width), instead of ``img_size``.
        defaults: Arguments that the options override.

    Raises:
        ValueError: If options contradict each other.
    """
    in_chans = model.in_chans
    if input_size is not None:
        if in_chans not in (None, input_size[0]):
            raise ValueError(f'--in-chans {in_chans} contradicts --input-size {input_size}')
        in_chans = input_size[0]
        if img_size is not None and list(input_size[1:]) != [img_size] * 2:
            raise ValueError(f'--img-size {img_size} contradicts --input-size {input_size}')
    counts = {'num_classes': model.num_classes, 'in_chans': in_chans}
    check_no_conflict(model.model_kwargs, {name: value for name, value in counts.items() if value is not None})
    cfg = find_pretrained_cfg(model.model) if model.model else None
    fixed_img_size = None
    if cfg is not None and cfg.fixed_input_size:  # a ViT
        fixed_img_size = tuple(input_size[1:]) if input_size else None if img_size is None else (img_size, img_size)
    given = {**counts, 'img_size': fixed_img_size, **model.model_kwargs}
    return {**defaults, **{key: value for key, value in given.items() if value is not None}}


def check_no_conflict(model_kwargs: Dict[str, Any], given: Dict[str, Any]) -> None:
    """Raise ValueError if ``--model-kwargs`` and another option give an argument different values."""
    for name, value in given.items():
        if model_kwargs.get(name, value) != value:
            raise ValueError(
                f'--model-kwargs {name}={model_kwargs[name]} contradicts the {value} that another option gives')


def check_model_name(name: str) -> None:
    """Raise ValueError unless a name is timm's, ours, ``hf-hub:OWNER/NAME`` or ``local-dir:FOLDER``."""
    source, _ = parse_model_name(name)
    if source not in _SOURCES and not timm.is_model(name) and name not in list_sequence_models():
        for_images, for_sequences = timm.list_models('smpconv*'), list_sequence_models()
        hub_hint = f'; hf-hub:{name} is a repository of the Hub'
        hint = hub_hint if '/' in name else suggestion_suffix(name, [*for_images, *for_sequences])
        raise ValueError(
            f'no model is named {name!r}; this package has {for_images} for images and {for_sequences} for '
            f'sequences{hint}')


def parse_model_name(name: str) -> Tuple[str, str]:
    """Return the source of a model, ``hf-hub`` or ``local-dir``, and its name there; '' for timm's own names."""
    source, _, rest = name.partition(':')
    return (source, rest) if rest else ('', name)


def resolve_source(name: str) -> Tuple[str, Dict[str, Any]]:
    """Return the architecture of a model, and the arguments that its repository or folder gives to it.

    A model is the same without its place: a checkpoint that names both can be opened after the place has gone.

    Args:
        name: Name of a model that :func:`create_model` has created.
    """
    source, place = parse_model_name(name)
    if source not in _SOURCES:
        return name, {}
    load = load_model_config_from_path if source == 'local-dir' else load_model_config_from_hf
    _, architecture, arguments = load(place)
    return architecture, dict(arguments or {})


def create_model(name: Optional[str], pretrained: bool = False, **kwargs: Any) -> Any:
    """Create a model by ``timm.create_model``, or by ``create_sequence_model`` if timm has none of this name.

    Raises:
        ValueError: If there is no such model, it does not accept the arguments, has no pretrained weights, or cannot be
            downloaded.
    """
    if name is None:
        raise ValueError('--model is needed, e.g. smpconv_t, or smpconv_sdigits for sequences')
    check_model_name(name)
    source, repo = parse_model_name(name)
    if source == 'hf-hub':  # timm fetches the file as well, with other errors
        hub_download.download_verified(repo, 'config.json')
    try:
        if pretrained and not source and not _has_weights(name, **kwargs):  # timm advises pretrained=False
            raise ValueError(
                'there are no pretrained weights except in files: validate.py --checkpoint, train.py '
                '--initial-checkpoint')
        if name in list_sequence_models():
            return create_sequence_model(name, **kwargs)
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except (AssertionError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f'{name} cannot be created: {first_line(error)}') from error


def _has_weights(name: str, pretrained_cfg: Any = None, pretrained_cfg_overlay: Any = None, **kwargs: Any) -> bool:
    """Return whether weights of a registered model are published, or given by timm's arguments."""
    if pretrained_cfg or pretrained_cfg_overlay:
        return True
    cfg = find_pretrained_cfg(name)
    return cfg is not None and bool(cfg.has_weights)


def find_pretrained_cfg(name: str) -> Optional[PretrainedCfg]:
    """Return what timm knows of a registered model's weights, None of other models.

    Raises:
        ValueError: If the name has a tag of no weights.
    """
    if not timm.is_model(name):
        return None
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:   # the tag behind the point
        known = timm.list_models(f'{name.partition(".")[0]}.*', include_tags=True)
        raise ValueError(f'no weights are named {name!r}; timm knows {known}') from error


class CheckpointedModel(NamedTuple):
    """Model in a checkpoint file, not created yet.

    Attributes:
        path: Path of the file.
        name: Name of the model.
        kwargs: Described arguments of its constructor.
        described: Description in the file.
        state_dict: Weights in the file.
        weights_key: Key of the weights in the file, '' if the file is itself a state dict.
    """
    path: str
    name: str
    kwargs: Dict[str, Any]
    described: Description
    state_dict: Dict[str, Tensor]
    weights_key: str

    def create(self, kwargs: Dict[str, Any]) -> Any:
        """Create the model with its weights, after a check that takes no memory for the model.

        Args:
            kwargs: Arguments of the constructor, in place of the described ones.

        Raises:
            ValueError: If there is no such network, or the weights are another network's.
        """
        check_model_name(self.name)
        try:
            check_network(self.name, kwargs, self.state_dict)
        except ValueError as error:
            trained = self.described.arguments.get('model')
            suffix = f'; it was trained as {checkpoint.printable(trained)}' if isinstance(trained, str) else ''
            raise ValueError(f'{self.path}: {error}{architecture_hint(self.state_dict)}{suffix}') from error
        model = create_model(self.name, **kwargs)
        load_weights(model, self.state_dict, self.path)
        return model


def open_checkpoint(path: str, name: Optional[str] = None, use_ema: Optional[bool] = None) -> CheckpointedModel:
    """Read a checkpoint, and find out which model it holds.

    Args:
        path: Path of a checkpoint of ours, of timm or of the original release.
        name: Name of the model, by default the described one, otherwise that of the model that the weights fit; it may
            be of a repository or a folder.
        use_ema: Whether to prefer the EMA weights; by default as :func:`.checkpoint.select_state_dict` does.

    Raises:
        ValueError: If the file is no checkpoint, or no known model is named and the weights fit none of this package.
    """
    loaded = checkpoint.load_file(path)
    described = checkpoint.describe(loaded, path)
    state_dict, key = select_weights(loaded, path, use_ema)
    if name is None:
        name = described.model
        if name is None or not (timm.is_model(name) or name in list_sequence_models()):
            match = identify(state_dict)
            if match is None:
                found = f'names {checkpoint.shown(name)}, no model of this package or of timm' if name else (
                    'names no model')
                raise ValueError(f'{path} {found}: --model is needed, e.g. smpconv_t')
            kwargs = {'num_classes': match.num_classes, 'in_chans': match.in_chans}
            return CheckpointedModel(path, match.name, kwargs, described, state_dict, key)
    return CheckpointedModel(path, name, described.model_kwargs, described, state_dict, key)


def select_weights(loaded: Any, path: str, use_ema: Optional[bool] = None) -> Tuple[Dict[str, Tensor], str]:
    """Return :func:`.checkpoint.select_state_dict` of a file; an error names the path."""
    try:
        return checkpoint.select_state_dict(loaded, use_ema)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error


def load_first_weights(model: Any, path: str, classes: Optional[List[str]]) -> str:
    """Load the weights of a checkpoint to start from, except for the classifier if its classes are others.

    Args:
        model: Model to load into.
        path: Path of a checkpoint, ours, timm's or the original release's, or the folder of a run.
        classes: Names of the classes to train, None if they are not known.

    Returns:
        Description of what was left out, '' if nothing was.

    Raises:
        ValueError: If the weights are another model's, or are not finite.
    """
    path = RunDir.best_checkpoint(path)
    loaded = checkpoint.load_file(path)
    state_dict, _ = select_weights(loaded, path)
    match = identify(state_dict)
    if match is not None and match.in_chans != model.in_chans:
        raise ValueError(
            f'{path} has weights for images of {match.in_chans} channels, and the model takes {model.in_chans}: '
            f'--in-chans {match.in_chans} takes them')
    trained = checkpoint.describe(loaded, path).classes
    own = model.state_dict()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    head = [names[id(parameter)] for parameter in classifier_parameters(model)]
    if checkpoint.is_original(state_dict):
        state_dict = checkpoint.convert_original(state_dict)
    is_other = trained is not None and classes is not None and trained != classes
    is_other |= any(state_dict[name].shape != own[name].shape for name in head if name in state_dict)
    if is_other:
        state_dict = copy.copy(state_dict)  # with its metadata
        state_dict.update({name: own[name] for name in head})
    load_weights(model, state_dict, path)
    try:
        checkpoint.check_finite(model.state_dict())
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    return 'without their classifier, which is of other classes' if is_other else ''


def load_weights(model: nn.Module, state_dict: Dict[str, Tensor], path: str) -> None:
    """Load weights, ours, timm's or the original release's, into a model that must fit them exactly.

    Args:
        model: Model to load into.
        state_dict: Weights from :func:`select_weights`.
        path: Path of the file, for messages.

    Raises:
        ValueError: If the weights are another model's, which is named if it is one of this package.
    """
    try:
        model.load_state_dict(checkpoint.convert_and_check(state_dict, model))
    except ValueError as error:
        raise ValueError(f'{path}: {error}{architecture_hint(state_dict)}') from error
