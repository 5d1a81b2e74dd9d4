"""A large kernel with a small one in parallel, which train better than either alone and end as one kernel."""
from typing import Any, Optional

import torch
from torch import Tensor, nn

from . import fuse
from .conv_norm import ConvNormActBlock, set_weight_bias
from .effective import plain_conv


class ReparamConv(nn.Module):
    """``large(x) + small(x)``, each with its norm: the re-parameterization trick of section 3.3 of the paper.

    Args:
        large: Convolution and norm.
        small: The same with a smaller kernel, aligned to the large one's middle (1-D: to its end, the present); None
            for none.
    """

    def __init__(self, large: ConvNormActBlock, small: Optional[ConvNormActBlock]) -> None:
        super().__init__()
        self.large = large
        self.small = small

    def forward(self, x: Tensor) -> Tensor:
        y = self.large(x)
        if self.small is not None:
            y = y + self.small(x)
        return y

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The same function with the kernel drawn once: a single convolution where the norms can be folded.

        Works in place, so that what shares the module shares the result; called again it returns the same.
        """
        self.large.reparameterize()
        branches = [self.large]
        if self.small is not None:
            self.small.reparameterize()
            branches.append(self.small)
        if not all(isinstance(branch.norm, nn.Identity) and plain_conv(branch.conv) for branch in branches):
            return self
        merged: Any = self.large.conv
        if self.small is not None:
            small: Any = self.small.conv
            merge = fuse.merge_causal if merged.weight.ndim == 3 else fuse.merge_parallel
            bias = sum(conv.bias for conv in (merged, small) if conv.bias is not None)
            bias = bias + merged.weight.new_zeros(merged.out_channels)  # neither has one where the norm is none
            set_weight_bias(merged, merge(merged.weight, small.weight), bias)
            self.small = None
        return merged
