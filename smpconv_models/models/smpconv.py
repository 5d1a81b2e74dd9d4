"""SMPConv networks for images.

Paper: SMPConv: Self-moving Point Representations for Continuous Convolution, Sanghyeon Kim and Eunbyung Park,
CVPR 2023, https://arxiv.org/abs/2304.02330. T and B are section 4.3 and appendix A.2, the mobile variants B.1.

Origin: https://github.com/sangnekim/SMPConv (MIT licence), whose T and B checkpoints load here. The block structure is
RepLKNet's (https://arxiv.org/abs/2203.06717). The implementation is this project's own, and so is the nano variant.
"""
from collections import OrderedDict
from typing import Any, Dict, Sequence, Union

import torch
from timm.layers import calculate_drop_path_rates, trunc_normal_
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from smpconv_models import checkpoint
from smpconv_models.layers import ConvFFN, ConvNormActBlock, LargeKernelBlock, ReparamLargeKernelConv, SMPLayer
from smpconv_models.layers.blocks import init_module_, pointwise
from smpconv_models.layers.checks import check_odd, check_rates
from smpconv_models.layers.conv_norm import ActLayer, NormLayer, create_act, create_norm

from ._base import StagedBackbone, cfg
from ._builder import build_model, convert_state_dict, infer_kernel_scale
from ._pretrained import HUB_NAMESPACE, ResolvedWeights

__all__ = ['SMPConvNet']


def conv3x3(
        in_channels: int, out_channels: int, stride: int, dilation: int, groups: int, norm_layer: NormLayer,
        act_layer: ActLayer, **dd: Any) -> ConvNormActBlock:
    """Create a 3x3 convolution, norm and activation."""
    return ConvNormActBlock(
        nn.Conv2d(
            in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False, **dd),
        create_norm(norm_layer, out_channels, **dd),
        create_act(act_layer),
    )


def create_stem(in_chans: int, dim: int, stride: int, **shared: Any) -> nn.Sequential:
    """Create the stem, with a reduction of 1, 2 or 4."""
    first_stride = min(stride, 2)
    return nn.Sequential(
        conv3x3(in_chans, dim, first_stride, 1, 1, **shared), conv3x3(dim, dim, 1, 1, dim, **shared),
        pointwise(dim, dim, **shared), conv3x3(dim, dim, stride // first_stride, 1, dim, **shared))


class SMPConvBlock(nn.Sequential):
    """Two residual blocks: a large-kernel ``mixer`` over the map and an ``ffn`` over the channels."""


class SMPConvStage(nn.Module):
    """A ``downsample`` (identity in the first stage) and the ``blocks``."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class SMPConvNet(StagedBackbone):
    """SMPConv network: a convolutional stem, stages of large-kernel blocks, norm, pooling, linear classifier.

    Args:
        in_chans: Number of channels of the image.
        num_classes: Number of classes; 0 for no classifier.
        global_pool: Pooling before the classifier, by timm's names; '' for none.
        output_stride: Largest reduction of the map; stages that would exceed it are dilated instead.
        stem_stride: Reduction of the stem: 1, 2 or 4.
        depths: Number of blocks of each stage.
        dims: Number of channels of each stage.
        kernel_sizes: Odd side of the large kernels of each stage.
        points_divisor: Divisor of the number of points: a kernel of side k has ``k * k // points_divisor``.
        mlp_ratio: Ratio of the ConvFFN's hidden channels to its channels.
        small_kernel_size: Odd side of the kernel parallel to the large one; 0 for none.
        kernel_scale: Density of the grids on which the points of ``kernel_sizes`` are sampled, one number for all
            stages or one for each: for images of another resolution than the weights were trained on. See
            :meth:`set_kernel_scale`.
        act_layer: Activation of the stem, the downsampling and the large-kernel blocks; a callable or timm's name.
        ffn_act_layer: Activation of the ConvFFN.
        norm_layer: Normalization; any callable that takes the channels, or timm's name.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0 at the first.
        weight_init: Initialization; 'skip' initializes the classifier only, if all other weights will be loaded.

    Raises:
        ValueError: The lengths differ, kernel sizes are even, the divisor leaves no points, or a stride or rate is
            invalid.
    """

    first_convs = ('stem.0.conv.weight',)

    def __init__(
            self, in_chans: int = 3, num_classes: int = 1000, global_pool: str = 'avg', output_stride: int = 32,
            stem_stride: int = 4, depths: Sequence[int] = (2, 2, 8, 2), dims: Sequence[int] = (96, 192, 384, 768),
            kernel_sizes: Sequence[int] = (31, 29, 27, 13), points_divisor: int = 4, mlp_ratio: float = 4.,
            small_kernel_size: int = 5, kernel_scale: Union[float, Sequence[float]] = 1., act_layer: ActLayer = 'relu',
            ffn_act_layer: ActLayer = 'gelu', norm_layer: NormLayer = 'batchnorm2d', drop_rate: float = 0.,
            drop_path_rate: float = 0., weight_init: str = '', device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        if weight_init not in ('', 'skip'):
            raise ValueError(f"weight_init must be '' or 'skip', got {weight_init!r}")
        _check_config(num_classes, output_stride, stem_stride, depths, dims, kernel_sizes, points_divisor)
        check_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        self.num_classes = num_classes
        self.in_chans = in_chans
        dd = {'device': device, 'dtype': dtype}
        shared: Dict[str, Any] = {'norm_layer': norm_layer, 'act_layer': act_layer, **dd}

        self.stem = create_stem(in_chans, dims[0], stem_stride, **shared)
        drop_path_rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.stages = nn.Sequential()
        self.feature_info = []
        reduction, dilation = stem_stride, 1
        for i, (dim, kernel_size) in enumerate(zip(dims, kernel_sizes)):
            downsample: nn.Module = nn.Identity()
            if i > 0:
                stride = 2 if reduction < output_stride else 1
                downsample = nn.Sequential(
                    pointwise(dims[i - 1], dim, **shared), conv3x3(dim, dim, stride, dilation, dim, **shared))
                reduction, dilation = reduction * stride, dilation * (2 // stride)
            num_points = kernel_size ** 2 // points_divisor
            self.stages.append(SMPConvStage(downsample, [
                SMPConvBlock(OrderedDict(
                    mixer=LargeKernelBlock(
                        dim, kernel_size, num_points, small_kernel_size, dilation, drop_path, **shared),
                    ffn=ConvFFN(dim, mlp_ratio, drop_path, ffn_act_layer, norm_layer, **dd)))
                for drop_path in drop_path_rates[i]]))
            self.feature_info.append({'num_chs': dim, 'reduction': reduction, 'module': f'stages.{i}'})

        self.add_head(create_norm(norm_layer, dims[-1], **dd), dims[-1], global_pool, drop_rate, **dd)
        for module in (self.head if weight_init == 'skip' else self).modules():
            self.init_module(module, needs_reset=False)
        self.set_kernel_scale(kernel_scale)

    @torch.jit.ignore
    def init_module(self, module: nn.Module, needs_reset: bool) -> None:
        init_module_(module, (nn.Conv2d, nn.Linear), trunc_normal_, needs_reset)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        return dict(
            stem=r'^stem',
            blocks=r'^stages\.(\d+)' if coarse else [
                (r'^stages\.(\d+)\.downsample', (0,)),
                (r'^stages\.(\d+)\.blocks\.(\d+)', None),
                (r'^norm', (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_kernel_scale(self, scale: Union[float, Sequence[float]]) -> None:
        """Sample the large kernels on other grids from now on; the parameters stay unchanged.

        The elements are ``scale`` times as dense, and a constant image gets the same response. The small kernels beside
        the large ones have no other resolution, and stay.

        Args:
            scale: Number for all stages, or one for each; see :meth:`ReparamLargeKernelConv.scaled_size`.

        Raises:
            ValueError: The numbers are not as many as the stages, a kernel would be smaller than the small one beside
                it, or the model is re-parameterized.
        """
        stages: Any = self.stages
        scales = list(scale) if isinstance(scale, (list, tuple)) else [scale] * len(stages)
        if len(scales) != len(stages):
            raise ValueError(f'kernel_scale must have one entry for each of {len(stages)} stages, got {scale}')
        sizes = [  # all of them are checked before any is changed
            (module.large.conv, module.scaled_size(factor)) for stage, factor in zip(stages, scales)
            for module in stage.modules()
            if isinstance(module, ReparamLargeKernelConv) and isinstance(module.large.conv, SMPLayer)]
        if not sizes and any(len(stage.blocks) for stage in stages):
            raise ValueError('kernel_scale cannot be changed: the model is re-parameterized and has no points left')
        for layer, size in sizes:
            layer.resize(size)


def _check_config(
        num_classes: int, output_stride: int, stem_stride: int, depths: Sequence[int], dims: Sequence[int],
        kernel_sizes: Sequence[int], points_divisor: int) -> None:
    if num_classes < 0:
        raise ValueError(f'num_classes must be at least 0, got {num_classes}')
    if stem_stride not in (1, 2, 4):
        raise ValueError(f'stem_stride must be 1, 2 or 4, got {stem_stride}')
    if output_stride not in (8, 16, 32):
        raise ValueError(f'output_stride must be 8, 16 or 32, got {output_stride}')
    if not len(depths) == len(dims) == len(kernel_sizes):
        raise ValueError(
            f'depths, dims and kernel_sizes must have one entry for each stage, got {len(depths)}, {len(dims)} and '
            f'{len(kernel_sizes)}')
    if not depths:
        raise ValueError('there must be at least one stage, got empty depths')
    for kernel_size in kernel_sizes:
        check_odd(kernel_size)
        if not 1 <= points_divisor <= kernel_size ** 2:
            raise ValueError(
                f'points_divisor must leave at least one point of a {kernel_size}x{kernel_size} kernel, so lie in '
                f'[1, {kernel_size ** 2}], got {points_divisor}'
            )


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: SMPConvNet) -> Dict[str, Tensor]:
    """Convert a state dict in the original release's names or ours to our names.

    If the model differs from its ``pretrained_cfg`` in classes or input channels, timm drops the classifier or adapts
    the first convolution.

    Raises:
        ValueError: The state dict is of another model, or has weights that are not finite.
    """
    state_dict = convert_state_dict(state_dict, model)
    checkpoint.check_finite(state_dict)
    return state_dict


default_cfgs = generate_default_cfgs({
    'smpconv_t.in1k': cfg(hf_hub_id=f'{HUB_NAMESPACE}/smpconv_t.in1k'),
    'smpconv_b.in1k': cfg(hf_hub_id=f'{HUB_NAMESPACE}/smpconv_b.in1k'),
    'smpconv_mobile31.untrained': cfg(),
    'smpconv_mobile51.untrained': cfg(),
    'smpconv_nano.untrained': cfg(input_size=(3, 32, 32), pool_size=(2, 2), crop_pct=1.0),
})


def _create_smpconv(variant: str, pretrained: bool, model_args: Dict[str, Any], **overrides: Any) -> SMPConvNet:
    """Create a variant; ``overrides`` are the user's arguments and those of a repository's config."""
    def args_for_weights(weights: ResolvedWeights) -> Dict[str, Any]:
        kwargs: Dict[str, Any] = {}
        if weights.state_dict:  # only the classifier's may be missing
            kwargs['weight_init'] = overrides.get('weight_init', 'skip')
        if 'kernel_sizes' in overrides:
            default_sizes = {**model_args, **overrides.get('pretrained_model_args', {})}['kernel_sizes']
            kwargs.update(infer_kernel_scale(weights.state_dict, default_sizes, **{**model_args, **overrides}))
        return kwargs

    return build_model(SMPConvNet, variant, pretrained, model_args, checkpoint_filter_fn, overrides, args_for_weights)


@register_model
def smpconv_t(pretrained: bool = False, **kwargs: Any) -> SMPConvNet:
    """SMPConv-T: 27 M parameters."""
    model_args = dict(
        depths=(2, 2, 8, 2), dims=(96, 192, 384, 768), kernel_sizes=(31, 29, 27, 13), points_divisor=4,
        drop_path_rate=0.1)
    return _create_smpconv('smpconv_t', pretrained, model_args, **kwargs)


@register_model
def smpconv_b(pretrained: bool = False, **kwargs: Any) -> SMPConvNet:
    """SMPConv-B: 80 M parameters."""
    model_args = dict(
        depths=(2, 2, 20, 2), dims=(128, 256, 512, 1024), kernel_sizes=(31, 29, 27, 13), points_divisor=4,
        drop_path_rate=0.5)
    return _create_smpconv('smpconv_b', pretrained, model_args, **kwargs)


@register_model
def smpconv_mobile31(pretrained: bool = False, **kwargs: Any) -> SMPConvNet:
    """SMPConv-mobile with kernels of up to 31x31."""
    model_args = dict(
        depths=(2, 2, 2, 2), dims=(64, 128, 256, 320), kernel_sizes=(31, 29, 27, 13), points_divisor=8, mlp_ratio=2.)
    return _create_smpconv('smpconv_mobile31', pretrained, model_args, **kwargs)


@register_model
def smpconv_mobile51(pretrained: bool = False, **kwargs: Any) -> SMPConvNet:
    """SMPConv-mobile with kernels of up to 51x51."""
    model_args = dict(
        depths=(2, 2, 2, 2), dims=(64, 128, 256, 320), kernel_sizes=(51, 49, 47, 13), points_divisor=8, mlp_ratio=2.)
    return _create_smpconv('smpconv_mobile51', pretrained, model_args, **kwargs)


@register_model
def smpconv_nano(pretrained: bool = False, **kwargs: Any) -> SMPConvNet:
    """SMPConv-nano, this project's own: for small images (32x32) and CPUs."""
    model_args = dict(
        depths=(1, 1, 2, 1), dims=(24, 48, 72, 96), kernel_sizes=(15, 13, 7, 5), points_divisor=4, stem_stride=2,
        mlp_ratio=2., small_kernel_size=3,
    )
    return _create_smpconv('smpconv_nano', pretrained, model_args, **kwargs)
