"""SMPConv networks for sequences, and their factory.

Paper: SMPConv: Self-moving Point Representations for Continuous Convolution, Sanghyeon Kim and Eunbyung Park,
CVPR 2023, https://arxiv.org/abs/2304.02330, section 4.2 and appendix A.1.

Origin: https://github.com/sangnekim/SMPConv (MIT licence), whose checkpoints load here. The structure is that of
FlexTCN (https://arxiv.org/abs/2110.08059), a temporal convolutional network. The implementation is this project's own,
and so is the variant for digits. The networks are no image models, so they are not in timm's registry but created by
:func:`create_sequence_model`.
"""
from typing import Any, Dict, List, Optional

import torch
from torch import Tensor, nn

from smpconv_models.layers import CausalConv1d, ReparamConv, ResidualBlock, SMPConv1d, smp_layers
from smpconv_models.layers.blocks import init_module_
from smpconv_models.layers.checks import check_counts, check_num_classes, check_rates, check_small_kernel
from smpconv_models.utils.errors import suggestion_suffix

from ._base import SMPNet

__all__ = ['SMPSequenceNet', 'create_sequence_model', 'list_sequence_models']


class SMPSequenceNet(SMPNet):
    """Causal network over a sequence: residual blocks whose kernels are as long as it, then the last step's features.

    Args:
        sequence_length: Number of steps L of a sequence. Other lengths raise; see :meth:`set_sequence_length`.
        in_chans: Number of channels of the sequence.
        num_classes: Number of classes; 0 for no classifier.
        depth: Number of residual blocks, of two convolutions each.
        dim: Number of channels of the blocks.
        num_points: Number of points of each filter.
        kernel_size: Number of kernel elements, by default L.
        small_kernel_size: Number of elements of the kernels parallel to the large ones; 0 for none.
        conv_bias: Whether the large convolutions have biases.
        coords_std: Spread of the points' initial positions; see :class:`~smpconv_models.SMPConv1d`.
        init_radius: Initial radius of the points, by default ``2 / kernel_size``.
        input_drop_rate: Dropout rate of the sequence.
        block_drop_rate: Dropout rate within the blocks.
        drop_rate: Dropout rate before the classifier.
        method: Method of the large convolutions; see :func:`~smpconv_models.layers.causal_conv1d`.

    Shapes: ``(N, in_chans, L)`` to ``(N, num_classes)``.

    Raises:
        ValueError: A size is invalid, a small kernel larger than the large one, or a rate outside of [0, 1).
    """

    def __init__(
            self, sequence_length: int, in_chans: int = 1, num_classes: int = 10, depth: int = 6, dim: int = 30,
            num_points: int = 30, kernel_size: Optional[int] = None, small_kernel_size: int = 5,
            conv_bias: bool = False, coords_std: float = 0.1, init_radius: Optional[float] = None,
            input_drop_rate: float = 0., block_drop_rate: float = 0., drop_rate: float = 0., method: str = 'auto',
            device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        kernel_size = sequence_length if kernel_size is None else kernel_size
        check_counts(sequence_length=sequence_length, in_chans=in_chans, depth=depth, dim=dim, kernel_size=kernel_size)
        check_small_kernel(small_kernel_size, kernel_size)
        check_rates(input_drop_rate=input_drop_rate, block_drop_rate=block_drop_rate, drop_rate=drop_rate)
        check_num_classes(num_classes)
        dd = {'device': device, 'dtype': dtype}
        self.train_length = sequence_length
        self.sequence_length = sequence_length
        self.small_kernel_size = small_kernel_size
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dim

        def conv(in_channels: int) -> ReparamConv:
            large = SMPConv1d(
                in_channels, dim, kernel_size, num_points, conv_bias, coords_std, init_radius, method=method, **dd)
            small = CausalConv1d(
                in_channels, dim, small_kernel_size, bias=False, method='direct', **dd) if small_kernel_size else None
            return ReparamConv(large, small, lambda: nn.BatchNorm1d(dim, **dd))

        self.input_drop = nn.Dropout(input_drop_rate)
        widths = [in_chans] + [dim] * depth
        self.blocks = nn.Sequential(*(
            ResidualBlock(
                conv(before), conv(dim), nn.Identity() if before == dim else nn.Conv1d(before, dim, 1, **dd),
                block_drop_rate, is_temporal=True)
            for before in widths[:-1]))
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Linear(dim, num_classes, **dd) if num_classes else nn.Identity()
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_module(self, module: nn.Module, needs_reset: bool) -> None:
        if module is not self.head:
            init_module_(module, needs_reset=needs_reset)

    @torch.jit.ignore
    def init_classifier(self) -> None:
        if isinstance(self.head, nn.Linear):
            nn.init.normal_(self.head.weight, std=.01)
            nn.init.zeros_(self.head.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        return dict(stem=r'^input_drop', blocks=r'^blocks\.(\d+)')

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int) -> None:
        check_num_classes(num_classes)
        some_weight = next(self.blocks.parameters())
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head.to(device=some_weight.device, dtype=some_weight.dtype)
        self.init_classifier()

    @torch.jit.ignore
    def set_sequence_length(self, sequence_length: int) -> None:
        """Set the length of the sequences, for another sampling rate or duration.

        The kernels are resampled with as many times more elements as the sequences have more steps than those of the
        constructor, and every point keeps its sum. The parameters stay unchanged: a state dict fits at every length.

        Args:
            sequence_length: Number of steps of a sequence.

        Raises:
            ValueError: The length is not positive, the kernels would be shorter than the small ones beside them, or
                the model is re-parameterized.
        """
        check_counts(sequence_length=sequence_length)
        layers: Any = list(smp_layers(self).values())
        if not layers:
            raise ValueError('sequence_length cannot be changed: the model is re-parameterized and has no points left')
        scaled = [max(round(layer.base_size * sequence_length / self.train_length), 1) for layer in layers]
        if min(scaled) < self.small_kernel_size:
            raise ValueError(
                f'sequence_length must leave kernels of at least {self.small_kernel_size} elements, got {min(scaled)} '
                f'({sequence_length} steps)')
        for layer, size in zip(layers, scaled):
            layer.resize(size)
        self.sequence_length = sequence_length

    def forward_features(self, x: Tensor) -> Tensor:
        """Map ``(N, in_chans, L)`` to ``(N, dim, L)``."""
        if x.ndim != 3 or x.shape[1] != self.in_chans:
            raise ValueError(f'expected sequences (N, {self.in_chans}, {self.sequence_length}), got {list(x.shape)}')
        if x.shape[-1] != self.sequence_length:
            raise ValueError(
                f'expected sequences of {self.sequence_length} steps, got {x.shape[-1]}: set_sequence_length resamples '
                'the kernels for other lengths')
        return self.blocks(self.input_drop(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map ``(N, dim, L)`` to ``(N, num_classes)`` by the last step, which depends on all others."""
        x = self.head_drop(x[:, :, -1])
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


# The paper's networks (tables 2 and 3), and one for the embedded digits.
_VARIANTS: Dict[str, Dict[str, Any]] = {
    'smpconv_smnist': dict(sequence_length=784, init_radius=0.002, input_drop_rate=0.1),
    'smpconv_scifar10': dict(sequence_length=1024, in_chans=3, conv_bias=True, init_radius=0.002),
    'smpconv_characters': dict(sequence_length=182, in_chans=3, num_classes=20, conv_bias=True, init_radius=0.012),
    'smpconv_speech_mfcc': dict(
        sequence_length=161, in_chans=20, conv_bias=True, init_radius=0.012, block_drop_rate=0.2),
    'smpconv_speech': dict(sequence_length=16000, init_radius=0.0002, block_drop_rate=0.1),
    'smpconv_sdigits': dict(sequence_length=64, depth=3, input_drop_rate=0.1),
}


def list_sequence_models() -> List[str]:
    """Return the names that :func:`create_sequence_model` takes."""
    return sorted(_VARIANTS)


def create_sequence_model(name: str, **kwargs: Any) -> SMPSequenceNet:
    """Create a network for sequences, like ``timm.create_model`` for images.

    Args:
        name: Name in :func:`list_sequence_models`: ``smpconv_smnist`` (also for permuted MNIST), ``smpconv_scifar10``,
            ``smpconv_characters``, ``smpconv_speech_mfcc``, ``smpconv_speech`` (16,000 steps), ``smpconv_sdigits``.
        kwargs: Arguments of :class:`SMPSequenceNet`; they take precedence over those of the variant.

    Raises:
        ValueError: The name is unknown, or as for the constructor.
        TypeError: An argument is unknown.
    """
    if name not in _VARIANTS:
        raise ValueError(
            f'no network for sequences is named {name!r}, there are {list_sequence_models()}'
            f'{suggestion_suffix(name, _VARIANTS)}')
    return SMPSequenceNet(**{**_VARIANTS[name], **kwargs})
