"""SMPConv network for small images.

Paper: SMPConv: Self-moving Point Representations for Continuous Convolution, Sanghyeon Kim and Eunbyung Park,
CVPR 2023, https://arxiv.org/abs/2304.02330, section 4.3 (CIFAR10) and appendix A.1.

Origin: https://github.com/sangnekim/SMPConv (MIT licence), whose checkpoint loads here. The structure is that of
FlexNet (https://arxiv.org/abs/2110.08059), a residual network that keeps the resolution. The implementation is this
project's own.
"""
from functools import partial
from typing import Any, Dict, List, Optional, Sequence

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead
from timm.models import adapt_input_conv, checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from smpconv_models import checkpoint
from smpconv_models.layers import FFTConv2d, ReparamConv, ResidualBlock, SMPConv2d, smp_layers
from smpconv_models.layers.blocks import init_weights_
from smpconv_models.layers.checks import check_counts, check_num_classes, check_odd, check_rates, check_small_kernel
from smpconv_models.layers.conv_norm import NormLayer, create_norm

from ._base import StagedBackbone
from ._builder import adapt, create
from ._pretrained import HUB_NAMESPACE

__all__ = ['SMPResNet']

# What ablations may leave as it was drawn.
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

    Points are per filter, and the kernels divided by |N(x)| (equation 1 of the paper).

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: Pooling before the classifier, by timm's names; '' for none.
        depths: Blocks of each stage.
        dims: Channels of each stage; the stem has the first's.
        kernel_size: Odd side of the large kernels.
        num_points: Points of each filter.
        small_kernel_size: Odd side of the kernels parallel to the large ones; 0 for none.
        coords_std: Standard deviation of the points' places at the start.
        init_radius: Of the points at the start, else ``4 / kernel_size``.
        learned: Which of 'coords' and 'radius' are trained; the others stay as they were drawn (table 6).
        norm_layer: Normalization; any callable that takes the channels, or timm's name.
        drop_rate: Dropout before the classifier.
        block_drop_rate: Dropout between the two convolutions of a block.
        method: Of the large convolutions; see :func:`~smpconv_models.layers.fft_conv2d`.

    Raises:
        ValueError: Lengths that differ, even kernel sizes, a rate or a name that can't be.
    """

    first_convs = ('stem.large.conv.weight', 'stem.small.conv.weight')

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 10,
            global_pool: str = 'avg',
            depths: Sequence[int] = (2, 3, 2),
            dims: Sequence[int] = (24, 36, 48),
            kernel_size: int = 33,
            num_points: int = 16,
            small_kernel_size: int = 3,
            coords_std: float = 0.05,
            init_radius: Optional[float] = None,
            learned: Sequence[str] = _LEARNED,
            norm_layer: NormLayer = 'batchnorm2d',
            drop_rate: float = 0.,
            block_drop_rate: float = 0.,
            method: str = 'auto',
            device: Any = None,
            dtype: Any = None,
    ) -> None:
        super().__init__()
        _check(in_chans, depths, dims, kernel_size, small_kernel_size, num_classes, learned)
        check_rates(drop_rate=drop_rate, block_drop_rate=block_drop_rate)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
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
        stages = []
        feature_info: List[Dict[str, Any]] = []
        before = dims[0]
        for i, (depth, dim) in enumerate(zip(depths, dims)):
            blocks = []
            for _ in range(depth):
                shortcut = nn.Identity() if before == dim else nn.Conv2d(before, dim, 1, **dd)
                blocks.append(ResidualBlock(
                    conv(before, dim), conv(dim, dim), shortcut, block_drop_rate, is_temporal=False))
                before = dim
            stages.append(SMPResStage(*blocks))
            feature_info.append({'num_chs': dim, 'reduction': 1, 'module': f'stages.{i}'})
        self.stages = nn.Sequential(*stages)
        self.feature_info = feature_info
        self.num_features = dims[-1]
        self.norm = nn.Identity()
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()
        for layer in smp_layers(self).values():
            layer.coords.requires_grad_('coords' in learned)
            layer.radius.requires_grad_('radius' in learned)
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draws the initial weights.

        Args:
            needs_reset: Also reset the norms and points, whose constructors have done so; for a model that was made
                on the meta device and moved by ``to_empty``.
        """
        self.apply(partial(init_weights_, needs_reset=needs_reset))
        _init_classifier(self.head.fc)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        return dict(stem=r'^stem', blocks=r'^stages\.(\d+)' if coarse else r'^stages\.(\d+)\.(\d+)')

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        _init_classifier(self.head.fc)

    def forward_stem(self, x: Tensor) -> Tensor:
        return self.act(self.stem(x))


def _check(
        in_chans: int,
        depths: Sequence[int],
        dims: Sequence[int],
        kernel_size: int,
        small_kernel_size: int,
        num_classes: int,
        learned: Sequence[str],
) -> None:
    if len(depths) != len(dims) or not depths:
        raise ValueError(
            f'depths and dims must have one entry for each stage, got {len(depths)} and {len(dims)}')
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


def _init_classifier(fc: nn.Module) -> None:
    if isinstance(fc, nn.Linear):
        nn.init.kaiming_normal_(fc.weight)
        nn.init.zeros_(fc.bias)


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: SMPResNet) -> Dict[str, Tensor]:
    """State dict of the original release or of ours -> ours, for the model's input channels.

    Raises:
        ValueError: It is another model's, of channels that can't become the model's, or has weights that are not
            finite. Where the model differs from its ``pretrained_cfg`` in classes, timm drops the classifier.
    """
    state_dict = dict(adapt(state_dict, model))
    checkpoint.check_finite(state_dict)
    for name in model.first_convs:
        if name in state_dict:
            state_dict[name] = _for_channels(state_dict[name], model.in_chans)
    return state_dict


def _for_channels(weight: Tensor, in_chans: int) -> Tensor:
    """As timm adapts the first convolution's weight, of an image convolution or of points, ``(out, in, P)``."""
    given = weight.shape[1]
    if given == in_chans:
        return weight
    if in_chans == 1:
        return weight.sum(1, keepdim=True)
    if given != 3:
        raise ValueError(f'weights of {given} input channels can become those of 1, expected that, got {in_chans}')
    if weight.ndim == 3:
        return adapt_input_conv(in_chans, weight.unsqueeze(-1)).squeeze(-1)
    return adapt_input_conv(in_chans, weight)


default_cfgs = generate_default_cfgs({
    'smpconv_cifar.cifar10': {
        'url': '', 'hf_hub_id': f'{HUB_NAMESPACE}/smpconv_cifar.cifar10', 'num_classes': 10,
        'input_size': (3, 32, 32), 'pool_size': (32, 32), 'crop_pct': 1.0, 'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,  # as the original trained
        'first_conv': (),  # checkpoint_filter_fn adapts it, as timm can't with points
        'classifier': 'head.fc',
        'paper_ids': 'arXiv:2304.02330',
        'paper_name': 'SMPConv: Self-moving Point Representations for Continuous Convolution',
        'origin_url': 'https://github.com/sangnekim/SMPConv', 'license': 'mit',
    },
})


@register_model
def smpconv_cifar(pretrained: bool = False, **kwargs: Any) -> SMPResNet:
    """The paper's network for CIFAR10: 489,646 parameters, kernels of 33x33."""
    model_args = dict(depths=(2, 3, 2), dims=(24, 36, 48), init_radius=0.12, block_drop_rate=0.1)
    return create(SMPResNet, 'smpconv_cifar', pretrained, model_args, checkpoint_filter_fn, kwargs)
