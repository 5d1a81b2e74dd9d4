"""What timm asks of all networks here: a stem, stages, a norm, a classifier."""
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Set, Tuple, Union

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn


class StagedBackbone(nn.Module):
    """A network whose stages give its features.

    Attributes:
        stem: Before the stages; see :meth:`forward_stem`.
        stages: In a ``nn.Sequential``, each with ``grad_checkpointing``.
        norm: After the last stage.
        head: timm's ``ClassifierHead``.
        feature_info: Of each stage.
        first_convs: Names of the weights that depend on the image's channels.
    """

    if TYPE_CHECKING:  # which TorchScript would take for the modules' types
        stem: Any
        stages: Any
        norm: nn.Module
        head: Any
        feature_info: List[Dict[str, Any]]
        num_features: int
        num_classes: int
        first_convs: Sequence[str]

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(('.coords', '.radius'))}

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
        some_weight = next(self.stem.parameters())  # reset() looks in the head, which may have had no parameter
        self.head.to(device=some_weight.device, dtype=some_weight.dtype)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    def forward_intermediates(
            self,
            x: Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """Forward pass that returns the stages' outputs.

        Args:
            x: Image ``(N, C, H, W)``.
            indices: Stages to return: the last n if an int, all if None, else those listed (negative from the end).
            norm: Apply the final norm to the last stage's output.
            stop_early: Leave out the stages after the last one asked for.
            output_fmt: 'NCHW', the only one there is.
            intermediates_only: Return the list alone, without the final features.

        Returns:
            Final features and the list of stage outputs, or the list alone.
        """
        assert output_fmt == 'NCHW', f"output_fmt must be 'NCHW', got {output_fmt}"
        intermediates: List[Tensor] = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last_index = len(self.stages) - 1

        x = self.forward_stem(x)
        if torch.jit.is_scripting() or not stop_early:  # TorchScript can't slice
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
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Removes what ``forward_intermediates`` doesn't need for these stages; returns their indices.

        The head goes with the last stage, whatever ``prune_head`` says: it fits that stage's channels only.
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
        """What comes before the stages."""
        return self.stem(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's output, after the norm."""
        return self.norm(self.stages(self.forward_stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
