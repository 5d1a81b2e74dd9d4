"""SMPConv network for small images.

Paper: SMPConv: Self-moving Point Representations for Continuous Convolution, Sanghyeon Kim and Eunbyung Park,
CVPR 2023, https://arxiv.org/abs/2304.02330, section 4.3 (CIFAR10) and appendix A.1.

Origin: https://github.com/sangnekim/SMPConv (MIT licence), whose checkpoint loads here. The structure is that of
FlexNet (https://arxiv.org/abs/2110.08059), a residual network that keeps the resolution. The implementation is this
project's own.
"""
from typing import Any, Dict, Optional, Sequence

import torch
from timm.models import adapt_input_conv, checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from smpconv_models import checkpoint
from smpconv_models.layers import FFTConv2d, ReparamConv, ResidualBlock, SMPConv2d, smp_layers
from smpconv_models.layers.blocks import init_module_
from smpconv_models.layers.checks import check_counts, check_num_classes, check_odd, check_rates, check_small_kernel
from smpconv_models.layers.conv_norm import NormLayer, create_norm

from ._base import StagedBackbone, cfg
from ._builder import build_model, convert_state_dict
from ._pretrained import HUB_NAMESPACE

__all__ = ['SMPResNet']

# Parameters that ablations may keep at their initial values.
_LEARNED = ('coords', 'radius')


class SMPResStage(nn.Sequential):
    """Residual blocks of one width."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.children(), x)
        for block in self:
            x = block(x)
        return x


class SMPResNet(StagedBackbone):
    """Residual network at one resolution: stem, stages of blocks of two large-kernel convolutions, pooling, classifier.

    Points are per filter, and the kernels divided by ``|N(x)|`` (equation 1 of the paper).

    Args:
        in_chans: Number of channels of the image.
        num_classes: Number of classes; 0 for no classifier.
        global_pool: Pooling before the classifier, by timm's names; '' for none.
        depths: Number of blocks of each stage.
        dims: Number of channels of each stage; the stem has the first stage's.
        kernel_size: Odd side of the large kernels.
        num_points: Number of points of each filter.
        small_kernel_size: Odd side of the kernels parallel to the large ones; 0 for none.
        coords_std: Standard deviation of the points' initial positions.
        init_radius: Initial radius of the points, by default ``4 / kernel_size``.
        learned: Names of the trained parameters among 'coords' and 'radius'; the others stay as initialized (table 6).
        norm_layer: Normalization; any callable that takes the channels, or timm's name.
        drop_rate: Dropout rate before the classifier.
        block_drop_rate: Dropout rate between the two convolutions of a block.
        method: Method of the large convolutions; see :func:`~smpconv_models.layers.fft_conv2d`.

    Raises:
        ValueError: The lengths differ, kernel sizes are even, or a rate or a name is invalid.
    """

    first_convs = ('stem.large.conv.weight', 'stem.small.conv.weight')

    def __init__(
            self, in_chans: int = 3, num_classes: int = 10, global_pool: str = 'avg', depths: Sequence[int] = (2, 3, 2),
            dims: Sequence[int] = (24, 36, 48), kernel_size: int = 33, num_points: int = 16, small_kernel_size: int = 3,
            coords_std: float = 0.05, init_radius: Optional[float] = None, learned: Sequence[str] = _LEARNED,
            norm_layer: NormLayer = 'batchnorm2d', drop_rate: float = 0., block_drop_rate: float = 0.,
            method: str = 'auto', device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        _check(in_chans, depths, dims, kernel_size, small_kernel_size, num_classes, learned)
        check_rates(drop_rate=drop_rate, block_drop_rate=block_drop_rate)
        self.num_classes = num_classes
        self.in_chans = in_chans
        dd = {'device': device, 'dtype': dtype}

        def conv(in_channels: int, out_channels: int, small_bias: bool = False) -> ReparamConv:
            large = SMPConv2d(
                in_channels, out_channels, kernel_size, num_points, False, coords_std, init_radius, method=method, **dd)
            small = FFTConv2d(
                in_channels, out_channels, small_kernel_size, bias=small_bias, method='direct', **dd,
            ) if small_kernel_size else None
            return ReparamConv(large, small, lambda: create_norm(norm_layer, out_channels, **dd))

        self.stem = conv(in_chans, dims[0], small_bias=True)
        self.act = nn.ReLU()
        self.stages = nn.Sequential()
        self.feature_info = []
        before = dims[0]
        for i, (depth, dim) in enumerate(zip(depths, dims)):
            blocks = []
            for _ in range(depth):
                shortcut = nn.Identity() if before == dim else nn.Conv2d(before, dim, 1, **dd)
                blocks.append(ResidualBlock(
                    conv(before, dim), conv(dim, dim), shortcut, block_drop_rate, is_temporal=False))
                before = dim
            self.stages.append(SMPResStage(*blocks))
            self.feature_info.append({'num_chs': dim, 'reduction': 1, 'module': f'stages.{i}'})
        self.add_head(nn.Identity(), dims[-1], global_pool, drop_rate, **dd)
        for layer in smp_layers(self).values():
            layer.coords.requires_grad_('coords' in learned)
            layer.radius.requires_grad_('radius' in learned)
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_module(self, module: nn.Module, needs_reset: bool) -> None:
        init_module_(module, needs_reset=needs_reset)

    @torch.jit.ignore
    def init_classifier(self) -> None:
        if isinstance(fc := self.head.fc, nn.Linear):
            nn.init.kaiming_normal_(fc.weight)
            nn.init.zeros_(fc.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        return dict(stem=r'^stem', blocks=r'^stages\.(\d+)' if coarse else r'^stages\.(\d+)\.(\d+)')

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self.init_classifier()

    def forward_stem(self, x: Tensor) -> Tensor:
        return self.act(self.stem(x))


def _check(
        in_chans: int, depths: Sequence[int], dims: Sequence[int], kernel_size: int, small_kernel_size: int,
        num_classes: int, learned: Sequence[str]) -> None:
    if len(depths) != len(dims) or not depths:
        raise ValueError(f'depths and dims must have one entry for each stage, got {len(depths)} and {len(dims)}')
    check_counts(
        in_chans=in_chans, **{f'depths[{stage}]': depth for stage, depth in enumerate(depths)},
        **{f'dims[{stage}]': dim for stage, dim in enumerate(dims)})
    check_odd(kernel_size)
    if small_kernel_size:
        check_odd(small_kernel_size)
    check_small_kernel(small_kernel_size, kernel_size)
    check_num_classes(num_classes)
    if isinstance(learned, str) or not set(learned) <= set(_LEARNED):
        raise ValueError(f'learned must be some of {_LEARNED}, got {learned!r}')


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: SMPResNet) -> Dict[str, Tensor]:
    """Convert a state dict in the original release's names or ours to our names and the model's input channels.

    If the model differs from its ``pretrained_cfg`` in classes, timm drops the classifier.

    Raises:
        ValueError: The state dict is of another model, of channels that cannot be converted to the model's, or has
            weights that are not finite.
    """
    state_dict = dict(convert_state_dict(state_dict, model))
    checkpoint.check_finite(state_dict)
    for name in model.first_convs:
        if name in state_dict:
            state_dict[name] = _adapt_input_channels(state_dict[name], model.in_chans)
    return state_dict


def _adapt_input_channels(weight: Tensor, in_chans: int) -> Tensor:
    """Convert a first convolution's weight as timm does, also that of points, ``(out, in, P)``."""
    given = weight.shape[1]
    if given == in_chans:
        return weight
    if in_chans == 1:
        return weight.sum(1, keepdim=True)
    if given != 3:
        raise ValueError(f'weights of {given} input channels can be converted to 1 channel only, got {in_chans}')
    if weight.ndim == 3:
        return adapt_input_conv(in_chans, weight.unsqueeze(-1)).squeeze(-1)
    return adapt_input_conv(in_chans, weight)


default_cfgs = generate_default_cfgs({
    'smpconv_cifar.cifar10': cfg(  # the original trained with ImageNet's mean and std
        hf_hub_id=f'{HUB_NAMESPACE}/smpconv_cifar.cifar10', num_classes=10, input_size=(3, 32, 32), pool_size=(32, 32),
        crop_pct=1.0, first_conv=()),  # checkpoint_filter_fn adapts it, as timm cannot adapt points
})


@register_model
def smpconv_cifar(pretrained: bool = False, **kwargs: Any) -> SMPResNet:
    """SMPConv for CIFAR10, the paper's: 489,646 parameters, kernels of 33x33."""
    model_args = dict(depths=(2, 3, 2), dims=(24, 36, 48), init_radius=0.12, block_drop_rate=0.1)
    return build_model(SMPResNet, 'smpconv_cifar', pretrained, model_args, checkpoint_filter_fn, kwargs)
