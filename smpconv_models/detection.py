"""torchvision's detectors on the networks of this package, or on any network with timm's `features_only`.

    from smpconv_models import detection

    backbone = detection.fpn_backbone('smpconv_t', pretrained=True, trainable_layers=3)
    model = detection.fasterrcnn(backbone, num_classes=91)

The detectors are torchvision's own classes: they take lists of images in [0, 1] and targets, return losses or
detections, and keep their other arguments. This module creates the parts that depend on the backbone: the pyramid, and
anchors and pooling for its levels. In training, call :func:`smpconv_models.clip_radius_` after each optimizer step.
``timm.utils.reparameterize_model`` accepts a detector as well as a network.
"""
import copy
from collections import OrderedDict
from inspect import signature
from itertools import pairwise
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Format, freeze_batch_norm_2d
from timm.models import FeatureInfo
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool

__all__ = ['FPNBackbone', 'fasterrcnn', 'fcos', 'fpn_backbone', 'maskrcnn', 'retinanet']

_RATIOS = (0.5, 1.0, 2.0)
_IMAGENET = {'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD}


class FPNBackbone(nn.Module):
    """Feature maps of a network and a feature pyramid over them; created by :func:`fpn_backbone`.

    Args:
        body: Network created by timm with ``features_only=True``.
        fpn: Pyramid over the same number of maps.
        out_channels: Number of channels of all levels of the pyramid.

    Attributes:
        strides: Strides in pixels of all levels of the pyramid, including those of the extra blocks.
        num_maps: Number of levels from a map of ``body``; they come first.
    """

    def __init__(self, body: nn.Module, fpn: FeaturePyramidNetwork, out_channels: int) -> None:
        super().__init__()
        self.body = body
        self.fpn = fpn
        self.out_channels = out_channels
        info: Any = body.feature_info
        self.num_maps = len(info.channels())
        self.strides = _pyramid_strides(fpn, info.channels(), info.reduction())

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        """Return the levels ``(N, out_channels, H / stride, W / stride)`` of images ``(N, C, H, W)``, finest first."""
        maps: Any = self.body(x)
        if isinstance(maps, dict):  # timm's feature_cls='dict' and 'hook'
            maps = maps.values()
        return self.fpn(OrderedDict((str(index), features) for index, features in enumerate(maps)))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the stages in the backward pass instead of storing their maps: less memory, more time.

        Raises:
            ValueError: If timm's feature extractor of this network does not support this.
        """
        switch: Any = getattr(self.body, 'set_grad_checkpointing', None)
        if switch is None:
            raise ValueError(f'{type(self.body).__name__} has no gradient checkpointing')
        switch(enable)


def fpn_backbone(
        backbone: Union[str, nn.Module], pretrained: bool = False, trainable_layers: Optional[int] = None,
        returned_layers: Optional[Sequence[int]] = None, out_channels: int = 256,
        extra_blocks: Optional[ExtraFPNBlock] = None, fpn_norm_layer: Optional[Callable[..., nn.Module]] = None,
        frozen_bn: Optional[bool] = None, **kwargs: Any) -> FPNBackbone:
    """Create a feature pyramid (FPN, https://arxiv.org/abs/1612.03144) on a backbone for torchvision's detectors.

    The arguments are those of torchvision's ``resnet_fpn_backbone``, except for the norms: ``frozen_bn`` freezes those
    of the backbone, and ``norm_layer`` is timm's argument. A layer is the stem or a stage.

    Args:
        backbone: timm's name of a network, or a network created by timm with ``features_only=True``, whose
            ``out_indices`` then are the levels.
        pretrained: Whether to load the pretrained weights of the named network.
        trainable_layers: Number of layers to train, counted from the last one used; the parameters of the others are
            frozen. The default is 3 with ``pretrained``, otherwise all.
        returned_layers: Stages whose maps the pyramid uses, counted from 1, ascending. For other networks these are
            timm's feature maps, which may start at the stem. The default are the last four maps.
        out_channels: Number of channels of the pyramid.
        extra_blocks: Module that adds coarser levels. The default is ``LastLevelMaxPool()``: one level of twice the
            stride.
        fpn_norm_layer: Normalization layer in the pyramid; the default is none.
        frozen_bn: Whether to replace the backbone's batch norms by torchvision's ``FrozenBatchNorm2d``, whose
            statistics and affine parameters do not change in training. The default is ``pretrained``.
        kwargs: Further arguments of ``timm.create_model`` for a network by name.

    Raises:
        ValueError: If the network or a map does not exist, ``trainable_layers`` is out of range, the extra blocks have
            other channels, or arguments for a network by name are given with a created one.
    """
    if isinstance(backbone, str):
        body: Any = _create_body(backbone, pretrained, returned_layers, kwargs)
    elif pretrained or returned_layers is not None or kwargs:
        raise ValueError(
            'pretrained, returned_layers and arguments of timm.create_model need a backbone given by name, got a '
            f'{type(backbone).__name__}')
    else:
        body = backbone
    _check_body(body)
    if out_channels < 1:
        raise ValueError(f'out_channels must be at least 1, got {out_channels}')
    _freeze_layers(body, trainable_layers, default=3 if pretrained else None)
    if pretrained if frozen_bn is None else frozen_bn:
        body = freeze_batch_norm_2d(body)  # after the weights are loaded: it copies their statistics
    fpn = FeaturePyramidNetwork(
        body.feature_info.channels(), out_channels, extra_blocks or LastLevelMaxPool(), fpn_norm_layer)
    return FPNBackbone(body, fpn, out_channels)


def fasterrcnn(backbone: FPNBackbone, num_classes: Optional[int] = 91, **kwargs: Any) -> FasterRCNN:
    """Create a Faster R-CNN (https://arxiv.org/abs/1506.01497) with anchors of eight strides at each level.

    Args:
        backbone: Backbone of :func:`fpn_backbone`; each map has twice the stride of the previous one.
        num_classes: Number of classes including the background, class 0; None with a ``box_predictor`` in ``kwargs``.
        kwargs: Further arguments of torchvision's class.

    Raises:
        ValueError: If boxes cannot be pooled from the levels, there are fewer than 2 classes, or torchvision refuses an
            argument.
        TypeError: If the class has no such argument.
    """
    _check(backbone, num_classes, may_be_none=True)
    return _detector(FasterRCNN, backbone, num_classes, _rcnn_defaults(backbone), kwargs)


def maskrcnn(backbone: FPNBackbone, num_classes: Optional[int] = 91, **kwargs: Any) -> MaskRCNN:
    """Create a Mask R-CNN (https://arxiv.org/abs/1703.06870); arguments and errors as in :func:`fasterrcnn`."""
    _check(backbone, num_classes, may_be_none=True)
    defaults = {**_rcnn_defaults(backbone), 'mask_roi_pool': _roi_align(backbone, output_size=14)}
    return _detector(MaskRCNN, backbone, num_classes, defaults, kwargs)


def retinanet(backbone: FPNBackbone, num_classes: int = 91, **kwargs: Any) -> RetinaNet:
    """Create a RetinaNet (https://arxiv.org/abs/1708.02002) with three anchor sizes from four strides at each level.

    Args:
        backbone: Backbone of :func:`fpn_backbone`, usually with ``returned_layers=(2, 3, 4)`` and
            ``extra_blocks=LastLevelP6P7(256, 256)``.
        num_classes: Number of classes including the background, class 0, which has an output in torchvision too.
        kwargs: Further arguments of torchvision's class.

    Raises:
        ValueError: If there are fewer than 2 classes, or torchvision refuses an argument.
        TypeError: If the class has no such argument.
    """
    _check(backbone, num_classes)
    sizes = tuple(tuple(int(4 * stride * 2 ** (i / 3)) for i in range(3)) for stride in backbone.strides)
    defaults = {**_statistics(backbone), 'anchor_generator': AnchorGenerator(sizes, (_RATIOS,) * len(sizes))}
    return _detector(RetinaNet, backbone, num_classes, defaults, kwargs)


def fcos(backbone: FPNBackbone, num_classes: int = 91, **kwargs: Any) -> FCOS:
    """Create an FCOS (https://arxiv.org/abs/1904.01355), with points one stride apart.

    Arguments and errors are those of :func:`retinanet`. The number of channels of the pyramid must be a multiple of 32,
    for the group norms of torchvision's head.
    """
    _check(backbone, num_classes)
    sizes = tuple((stride,) for stride in backbone.strides)
    defaults = {**_statistics(backbone), 'anchor_generator': AnchorGenerator(sizes, ((1.,),) * len(sizes))}
    return _detector(FCOS, backbone, num_classes, defaults, kwargs)


# --- the backbone ---


def _create_body(
        name: str, pretrained: bool, returned_layers: Optional[Sequence[int]], kwargs: Dict[str, Any]) -> nn.Module:
    """Create timm's feature extractor of a network by name."""
    for reserved in {'features_only', 'out_indices'} & set(kwargs):
        raise ValueError(f'{reserved} cannot be given for {name}: use returned_layers')
    if ':' not in name and not timm.is_model(name):
        raise ValueError(f"backbone must be timm's name of a network, or a network created by timm, got {name!r}")
    out_indices: Any = 4  # the last four
    if returned_layers is not None:
        out_indices = tuple(layer - 1 for layer in returned_layers)
        if list(out_indices) != sorted(set(out_indices)) or min(out_indices, default=-1) < 0:
            raise ValueError(f'returned_layers must be stages counted from 1, ascending, got {tuple(returned_layers)}')
    try:
        body = timm.create_model(name, pretrained=pretrained, features_only=True, out_indices=out_indices, **kwargs)
    except (AssertionError, IndexError) as error:  # errors of timm's networks for a missing map
        raise ValueError(f'{name} lacks a map of returned_layers={returned_layers}: {error}') from error
    except ValueError as error:
        if 'out_indices' not in str(error):
            raise
        raise ValueError(f'{name} lacks a stage of returned_layers={returned_layers}: {error} (from 0)') from error
    if 'in_chans' in kwargs and _in_chans(body) is None:
        body.in_chans = kwargs['in_chans']
    return body


def _check_body(body: Any) -> None:
    if not isinstance(body, nn.Module) or not isinstance(getattr(body, 'feature_info', None), FeatureInfo):
        raise ValueError(
            f"backbone must be timm's name of a network, or created with features_only=True, got {type(body).__name__}")
    layout: Any = getattr(body, 'output_fmt', Format.NCHW)
    if layout != Format.NCHW:
        raise ValueError(f"the backbone's maps must be NCHW, got {layout.value}")


def _freeze_layers(body: nn.Module, trainable_layers: Optional[int], default: Optional[int]) -> None:
    """Freeze all but the last `trainable_layers` layers, and everything after the last feature map used.

    The default None trains all layers.
    """
    layers, unused = _layers(body)
    if trainable_layers is None:
        trainable_layers = len(layers) if default is None else min(default, len(layers))
    if not 0 <= trainable_layers <= len(layers):
        raise ValueError(
            f'trainable_layers must lie in [0, {len(layers)}], counting stages and stem, got {trainable_layers}')
    for layer in [*layers[:len(layers) - trainable_layers], unused]:
        for parameter in layer:
            parameter.requires_grad_(False)


def _layers(body: Any) -> Tuple[List[List[nn.Parameter]], List[nn.Parameter]]:
    """Return the parameters of the stem and of each stage, in the order of registration, and those of later modules.

    The stem has all modules before that of the first map. A stage ends with the module of its map.
    """
    info = body.feature_info.info
    last = max(range(len(info))[index] for index in body.feature_info.out_indices)  # indices may be negative
    makers = {stage['module'].replace('.', '_') for stage in info[:last + 1]}  # names in timm's wrappers
    layers: List[List[nn.Parameter]] = [[]]
    current = ''  # prefix of the current map's module
    for name, module in body.named_modules():
        name = name.removeprefix('model.').replace('.', '_')
        makes_map = name in makers
        left = current and not name.startswith(current)
        if left or (makes_map and len(layers) == 1):
            layers.append([])
        if makes_map or left:
            current = f'{name}_' if makes_map else ''
        layers[-1].extend(module.parameters(recurse=False))
    unused = layers.pop() if not current and len(layers) > 1 else []
    return [layer for layer in layers if layer], unused


def _pyramid_strides(fpn: FeaturePyramidNetwork, channels: List[int], strides: List[int]) -> List[int]:
    """Return the strides of all levels, found with a copy on the meta device: extra blocks may be any module."""
    fpn = copy.deepcopy(fpn).to('meta')
    size = 32 * strides[-1]
    maps = OrderedDict(
        (str(index), torch.empty(2, count, size // stride, size // stride, device='meta'))
        for index, (count, stride) in enumerate(zip(channels, strides)))
    try:
        levels = fpn(maps).values()
    except RuntimeError as error:
        raise ValueError(f'extra_blocks do not fit the maps of {channels} channels and the pyramid: {error}') from error
    return [size // level.shape[-1] for level in levels]


# --- the detectors ---


def _check(backbone: Any, num_classes: Any, may_be_none: bool = False) -> None:
    if not isinstance(backbone, FPNBackbone):
        raise ValueError(f'backbone must be created by fpn_backbone, got {type(backbone).__name__}')
    if num_classes is None and may_be_none:
        return
    if not isinstance(num_classes, int) or num_classes < 2:
        raise ValueError(f'num_classes must be at least 2 including the background, got {num_classes}')


def _detector(
        kind: Callable[..., Any], backbone: FPNBackbone, num_classes: Optional[int], defaults: Dict[str, Any],
        kwargs: Dict[str, Any]) -> Any:
    """Create a detector, and refuse unknown arguments, which torchvision's transform would ignore."""
    known = {
        name for source in (kind, GeneralizedRCNNTransform) for name, parameter in signature(source).parameters.items()
        if parameter.kind != parameter.VAR_KEYWORD}
    for name in sorted(set(kwargs) - known):
        raise TypeError(f'{kind.__name__} got an unexpected keyword argument {name!r}')  # like any function
    return kind(backbone, num_classes, **{**defaults, **kwargs})


def _statistics(backbone: FPNBackbone) -> Dict[str, Any]:
    """Return mean and standard deviation of each input channel.

    They are those of the network's configuration, or torchvision's; for another number of channels, their mean.
    """
    body: Any = backbone.body
    cfg = {**_IMAGENET, **getattr(body, 'pretrained_cfg', {})}
    in_chans = _in_chans(body) or len(cfg['mean'])
    return {f'image_{name}': _of_channels(cfg[name], in_chans) for name in ('mean', 'std')}


def _in_chans(body: Any) -> Optional[int]:
    """Return the number of input channels, stored by timm's feature extractors since 1.0.31, or None."""
    return getattr(body, 'in_chans', None) or getattr(getattr(body, 'model', None), 'in_chans', None)


def _of_channels(values: Sequence[float], channels: int) -> List[float]:
    return list(values) if len(values) == channels else [sum(values) / len(values)] * channels


def _rcnn_defaults(backbone: FPNBackbone) -> Dict[str, Any]:
    sizes = tuple((8 * stride,) for stride in backbone.strides)
    return {
        **_statistics(backbone),
        'rpn_anchor_generator': AnchorGenerator(sizes, (_RATIOS,) * len(sizes)),
        'box_roi_pool': _roi_align(backbone, output_size=7),
    }


def _roi_align(backbone: FPNBackbone, output_size: int) -> MultiScaleRoIAlign:
    """Create pooling from the levels of the maps, without the extra levels."""
    strides = backbone.strides[:backbone.num_maps]
    if any(coarser != 2 * finer for finer, coarser in pairwise(strides)):  # a level is found by its octave
        raise ValueError(f'box pooling needs maps of twice the stride of the previous one, got strides {strides}')
    return MultiScaleRoIAlign([str(index) for index in range(backbone.num_maps)], output_size, sampling_ratio=2)
