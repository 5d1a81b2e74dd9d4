"""Bases of the networks: initialization, and timm's interface of a stem, stages, a norm and a classifier."""
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Set, Tuple, Union

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from smpconv_models.checkpoint.original import RELEASE_URL


class SMPNet(nn.Module):
    """Base of networks whose kernels are sampled from points."""

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Sample the initial weights.

        ``needs_reset`` resets the norms and points too, whose constructors have done so already; for a model that was
        made on the meta device and moved by ``to_empty``.
        """
        for module in self.modules():
            self.init_module(module, needs_reset)
        self.init_classifier()

    @torch.jit.ignore
    def init_module(self, module: nn.Module, needs_reset: bool) -> None:
        """Initialize one module; see ``smpconv_models.layers.blocks.init_module_``."""
        raise NotImplementedError

    @torch.jit.ignore
    def init_classifier(self) -> None:
        """Initialize the classifier, if its initialization differs from that of other modules."""

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(('.coords', '.radius'))}


class StagedBackbone(SMPNet):
    """Network whose stages' outputs are its features.

    Attributes:
        stem: Layers before the stages; see :meth:`forward_stem`.
        stages: ``nn.Sequential`` of stages, each with ``grad_checkpointing``.
        norm: Normalization after the last stage.
        head: timm's ``ClassifierHead``.
        feature_info: Channels, reduction and module of each stage.
        first_convs: Names of the weights that depend on the image's channels.
    """

    if TYPE_CHECKING:  # TorchScript would take annotations for the modules' types
        stem: Any
        stages: Any
        norm: nn.Module
        head: Any
        feature_info: List[Dict[str, Any]]
        num_features: int
        num_classes: int
        first_convs: Sequence[str]

    def add_head(self, norm: nn.Module, num_features: int, global_pool: str, drop_rate: float, **dd: Any) -> None:
        """Add the norm and the classifier, for a constructor."""
        self.norm = norm
        self.num_features = num_features
        self.drop_rate = drop_rate
        self.head = ClassifierHead(num_features, self.num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = num_features * self.head.global_pool.feat_mult()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        stage: Any
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        some_weight = next(self.stem.parameters())  # timm's reset() asks the head, which may have no parameter
        self.head.to(device=some_weight.device, dtype=some_weight.dtype)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    def forward_intermediates(
            self, x: Tensor, indices: Optional[Union[int, List[int]]] = None, norm: bool = False,
            stop_early: bool = False, output_fmt: str = 'NCHW',
            intermediates_only: bool = False) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """Run the forward pass and return the stages' outputs.

        Args:
            x: Image ``(N, C, H, W)``.
            indices: Stages to return: the last n for an int, all for None, otherwise a list (negative from the end).
            norm: Whether to apply the final norm to the last stage's output.
            stop_early: Whether to skip the stages after the last one to return.
            output_fmt: Layout of the outputs, always 'NCHW'.
            intermediates_only: Whether to return the list alone, without the final features.

        Returns:
            Final features and the list of stage outputs, or the list alone.
        """
        assert output_fmt == 'NCHW', f"output_fmt must be 'NCHW', got {output_fmt}"
        intermediates: List[Tensor] = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last_index = len(self.stages) - 1

        x = self.forward_stem(x)
        if torch.jit.is_scripting() or not stop_early:  # TorchScript cannot slice
            stages = self.stages
        else:
            stages = self.stages[:max_index + 1]
        index = 0
        for index, stage in enumerate(stages):
            x = stage(x)
            if index in take_indices:
                intermediates.append(self.norm(x) if norm and index == last_index else x)

        if intermediates_only:
            return intermediates
        if index == last_index:
            x = self.norm(x)
        return x, intermediates

    @torch.jit.ignore
    def prune_intermediate_layers(
            self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True) -> List[int]:
        """Remove what ``forward_intermediates`` does not need for these stages, and return their indices.

        Without the last stage the head is removed for any ``prune_head``: it fits that stage's channels only.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        shortened = max_index < len(self.stages) - 1
        if prune_norm or shortened:
            self.norm = nn.Identity().train(self.training)
        self.stages = self.stages[:max_index + 1]
        if shortened:
            self.num_features = self.feature_info[max_index]['num_chs']
            self.head.in_features = self.num_features
        if prune_head or shortened:
            self.reset_classifier(0, '')
        return take_indices

    def forward_stem(self, x: Tensor) -> Tensor:
        """Apply the layers before the stages."""
        return self.stem(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last stage's output, after the norm."""
        return self.norm(self.stages(self.forward_stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def cfg(url: str = '', **kwargs: Any) -> Dict[str, Any]:
    """Return a pretrained config of timm, by default for images of ImageNet."""
    return {
        'url': url, 'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.0.conv', 'classifier': 'head.fc',
        'paper_ids': 'arXiv:2304.02330',
        'paper_name': 'SMPConv: Self-moving Point Representations for Continuous Convolution',
        'origin_url': RELEASE_URL, 'license': 'mit',
        **kwargs,
    }
