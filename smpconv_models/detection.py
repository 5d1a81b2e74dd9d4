"""torchvision's detectors on our networks, or any that timm takes features from.

    from smpconv_models import detection

    backbone = detection.fpn_backbone('smpconv_t', pretrained=True, trainable_layers=3)
    model = detection.fasterrcnn(backbone, num_classes=91)

The detectors are torchvision's own classes: they take lists of images in [0, 1] and targets, return losses or
detections, and keep their other arguments. What is made here is what depends on the backbone: the pyramid, and anchors
and pooling for its levels. In training, call :func:`smpconv_models.clip_radius_` after each optimizer step;
``timm.utils.reparameterize_model`` takes a detector as it takes a network.
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
    """A network's feature maps and a feature pyramid over them; :func:`fpn_backbone` makes it.

    Args:
        body: Made by timm with ``features_only=True``.
        fpn: Over as many maps.
        out_channels: Channels of all levels of the pyramid.

    Attributes:
        strides: Of each level of the pyramid, those of the extra blocks included, in pixels.
        num_maps: Levels that come from a map of ``body``: they are the first.
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
        """Image ``(N, C, H, W)`` -> the levels ``(N, out_channels, H / stride, W / stride)``, finest first."""
        maps: Any = self.body(x)
        if isinstance(maps, dict):  # timm's feature_cls='dict' and 'hook'
            maps = maps.values()
        return self.fpn(OrderedDict((str(index), features) for index, features in enumerate(maps)))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Has the stages computed again in the backward pass, instead of kept: less memory, more time.

        Raises:
            ValueError: timm's features of this network can't do so.
        """
        switch: Any = getattr(self.body, 'set_grad_checkpointing', None)
        if switch is None:
            raise ValueError(f'{type(self.body).__name__} has no gradient checkpointing')
        switch(enable)


def fpn_backbone(
        backbone: Union[str, nn.Module],
        pretrained: bool = False,
        trainable_layers: Optional[int] = None,
        returned_layers: Optional[Sequence[int]] = None,
        out_channels: int = 256,
        extra_blocks: Optional[ExtraFPNBlock] = None,
        fpn_norm_layer: Optional[Callable[..., nn.Module]] = None,
        frozen_bn: Optional[bool] = None,
        **kwargs: Any,
) -> FPNBackbone:
    """A feature pyramid (FPN, https://arxiv.org/abs/1612.03144) on a backbone, as torchvision's detectors take it.

    The arguments are those of torchvision's ``resnet_fpn_backbone``, but for the norms: ``frozen_bn`` freezes the
    backbone's, and its ``norm_layer`` is timm's. A layer is the stem or a stage.

    Args:
        backbone: timm's name of a network, or one that timm has made with ``features_only=True``, whose
            ``out_indices`` are the levels then.
        pretrained: Load the named network's pretrained weights.
        trainable_layers: How many layers, from the last one used, are trained; the others' parameters are frozen. By
            default 3 with ``pretrained``, else all.
        returned_layers: Stages whose maps the pyramid has, counted from 1, ascending; for other networks timm's
            feature maps, which may begin at the stem. By default the last four maps.
        out_channels: Channels of the pyramid.
        extra_blocks: What adds coarser levels. By default ``LastLevelMaxPool()``: one level of twice the stride.
        fpn_norm_layer: Normalization in the pyramid, by default none.
        frozen_bn: Whether the backbone's batch norms become torchvision's ``FrozenBatchNorm2d``, whose statistics and
            affine parameters stay, in training too. By default where ``pretrained``.
        kwargs: Further arguments of ``timm.create_model`` for a network by name.

    Raises:
        ValueError: There is no such network or map, ``trainable_layers`` is out of range, extra blocks of other
            channels, arguments that a ready network has no use for.
    """
    if isinstance(backbone, str):
        body: Any = _create_body(backbone, pretrained, returned_layers, kwargs)
    elif pretrained or returned_layers is not None or kwargs:
        raise ValueError(
            'pretrained, returned_layers and arguments of timm.create_model are for a network by its name; '
            f'this one is made already: {type(backbone).__name__}')
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
    """Faster R-CNN (https://arxiv.org/abs/1506.01497): anchors of eight strides at each level.

    Args:
        backbone: Made by :func:`fpn_backbone`, each map of twice the stride of the one before.
        num_classes: With the background, which is class 0; None with a ``box_predictor`` in ``kwargs``.
        kwargs: Of torchvision's class.

    Raises:
        ValueError: Levels that boxes can't be pooled from, fewer than 2 classes, what torchvision refuses.
        TypeError: An argument that the class doesn't have.
    """
    _check(backbone, num_classes, may_be_none=True)
    return _detector(FasterRCNN, backbone, num_classes, _rcnn_defaults(backbone), kwargs)


def maskrcnn(backbone: FPNBackbone, num_classes: Optional[int] = 91, **kwargs: Any) -> MaskRCNN:
    """Mask R-CNN (https://arxiv.org/abs/1703.06870); otherwise as :func:`fasterrcnn`."""
    _check(backbone, num_classes, may_be_none=True)
    defaults = {**_rcnn_defaults(backbone), 'mask_roi_pool': _roi_align(backbone, output_size=14)}
    return _detector(MaskRCNN, backbone, num_classes, defaults, kwargs)


def retinanet(backbone: FPNBackbone, num_classes: int = 91, **kwargs: Any) -> RetinaNet:
    """RetinaNet (https://arxiv.org/abs/1708.02002): three anchor sizes from four strides on, at each level.

    Args:
        backbone: Made by :func:`fpn_backbone`; usually with ``returned_layers=(2, 3, 4)`` and
            ``extra_blocks=LastLevelP6P7(256, 256)``.
        num_classes: With class 0, the background, which torchvision gives an output too.
        kwargs: Of torchvision's class.

    Raises:
        ValueError: Fewer than 2 classes, what torchvision refuses.
        TypeError: An argument that the class doesn't have.
    """
    _check(backbone, num_classes)
    sizes = tuple(tuple(int(4 * stride * 2 ** (i / 3)) for i in range(3)) for stride in backbone.strides)
    defaults = {**_statistics(backbone), 'anchor_generator': AnchorGenerator(sizes, (_RATIOS,) * len(sizes))}
    return _detector(RetinaNet, backbone, num_classes, defaults, kwargs)


def fcos(backbone: FPNBackbone, num_classes: int = 91, **kwargs: Any) -> FCOS:
    """FCOS (https://arxiv.org/abs/1904.01355): points a stride apart; otherwise as :func:`retinanet`.

    torchvision's head normalizes groups of channels, so the pyramid's must be a multiple of 32.
    """
    _check(backbone, num_classes)
    sizes = tuple((stride,) for stride in backbone.strides)
    defaults = {**_statistics(backbone), 'anchor_generator': AnchorGenerator(sizes, ((1.,),) * len(sizes))}
    return _detector(FCOS, backbone, num_classes, defaults, kwargs)


# --- the backbone ---


def _create_body(
        name: str, pretrained: bool, returned_layers: Optional[Sequence[int]], kwargs: Dict[str, Any]) -> nn.Module:
    """The features of timm's network of this name."""
    for reserved in {'features_only', 'out_indices'} & set(kwargs):
        raise ValueError(f'{reserved} is for a network that timm has made; of {name}, by name, use returned_layers')
    if ':' not in name and not timm.is_model(name):
        raise ValueError(f"backbone must be timm's name of a network, or one made by timm, got {name!r}")
    out_indices: Any = 4  # the last four
    if returned_layers is not None:
        out_indices = tuple(layer - 1 for layer in returned_layers)
        if list(out_indices) != sorted(set(out_indices)) or min(out_indices, default=-1) < 0:
            raise ValueError(f'returned_layers must be stages, from 1 on and ascending, got {tuple(returned_layers)}')
    try:
        body = timm.create_model(name, pretrained=pretrained, features_only=True, out_indices=out_indices, **kwargs)
    except (AssertionError, IndexError) as error:  # timm's own networks refuse a map by these
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
            f"backbone must be timm's name of a network or made with features_only=True, got {type(body).__name__}")
    layout: Any = getattr(body, 'output_fmt', Format.NCHW)
    if layout != Format.NCHW:
        raise ValueError(f"the backbone's maps must be NCHW, got {layout.value}")


def _freeze_layers(body: nn.Module, trainable_layers: Optional[int], default: Optional[int]) -> None:
    """All layers but the last so many, by default so many, or none where that is None; and what no map comes from."""
    layers, unused = _layers(body)
    if trainable_layers is None:
        trainable_layers = len(layers) if default is None else min(default, len(layers))
    if not 0 <= trainable_layers <= len(layers):
        raise ValueError(
            f'trainable_layers must lie in [0, {len(layers)}], of which the last is the stem, got {trainable_layers}')
    for layer in [*layers[:len(layers) - trainable_layers], unused]:
        for parameter in layer:
            parameter.requires_grad_(False)


def _layers(body: Any) -> Tuple[List[List[nn.Parameter]], List[nn.Parameter]]:
    """The parameters of the stem and of each stage, in the order in which they are registered, and all that follow.

    The stem is what comes before the first map's module, a stage ends with its map's module.
    """
    info = body.feature_info.info
    last = max(range(len(info))[index] for index in body.feature_info.out_indices)  # they may count from the end
    makers = {stage['module'].replace('.', '_') for stage in info[:last + 1]}  # as timm's wrappers name them
    layers: List[List[nn.Parameter]] = [[]]
    current = ''  # the map's module that the walk is in
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
    """Those of all levels, found by sending maps through a copy that has no memory: extra blocks may be anything."""
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
        raise ValueError(f'backbone must be made by fpn_backbone, got {type(backbone).__name__}')
    if num_classes is None and may_be_none:
        return
    if not isinstance(num_classes, int) or num_classes < 2:
        raise ValueError(f'num_classes must be at least 2, as it counts the background, got {num_classes}')


def _detector(
        kind: Callable[..., Any], backbone: FPNBackbone, num_classes: Optional[int], defaults: Dict[str, Any],
        kwargs: Dict[str, Any]) -> Any:
    """torchvision's class, with the arguments that are none of its own refused: its transform would swallow them."""
    known = {
        name for source in (kind, GeneralizedRCNNTransform) for name, parameter in signature(source).parameters.items()
        if parameter.kind != parameter.VAR_KEYWORD}
    for name in sorted(set(kwargs) - known):
        raise TypeError(f'{kind.__name__} got an unexpected keyword argument {name!r}')  # as any function would
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
    """Return the number of input channels, which timm's wrappers of features keep since 1.0.31, or None."""
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
    """Pooling from the maps' own levels, the extra ones left out."""
    strides = backbone.strides[:backbone.num_maps]
    if any(coarser != 2 * finer for finer, coarser in pairwise(strides)):  # it finds a level by its octave
        raise ValueError(f'boxes are pooled from maps of twice the stride of the one before, got strides {strides}')
    return MultiScaleRoIAlign([str(index) for index in range(backbone.num_maps)], output_size, sampling_ratio=2)
