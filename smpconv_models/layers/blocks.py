"""The residual block of the paper's networks for sequences and small images."""
from torch import Tensor, nn

from .fft_conv import CausalConv1d
from .parallel import ReparamConv


class ResidualBlock(nn.Module):
    """``act(f(x) + shortcut(x))`` of two large-kernel convolutions.

    ``f`` is conv1, act, dropout, conv2, and in the networks for sequences act and dropout once more, as in a temporal
    convolutional network. The shortcut is a 1x1 convolution with a bias where the channels differ.

    Args:
        conv1: From the block's input channels to its own.
        conv2: Among its own.
        shortcut: From the input channels to its own, or an identity.
        drop_rate: Of the dropout.
        is_temporal: Whether activation and dropout follow the second convolution too.
    """

    def __init__(
            self,
            conv1: ReparamConv,
            conv2: ReparamConv,
            shortcut: nn.Module,
            drop_rate: float,
            is_temporal: bool,
    ) -> None:
        super().__init__()
        self.conv1 = conv1
        self.act1 = nn.ReLU()
        self.drop1 = nn.Dropout(drop_rate)
        self.conv2 = conv2
        self.act2: nn.Module = nn.ReLU() if is_temporal else nn.Identity()
        self.drop2: nn.Module = nn.Dropout(drop_rate) if is_temporal else nn.Identity()
        self.shortcut = shortcut
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop1(self.act1(self.conv1(x)))
        y = self.drop2(self.act2(self.conv2(y)))
        return self.act(y + self.shortcut(x))


def init_weights_(module: nn.Module, needs_reset: bool = False) -> None:
    """Draws the initial weights of one module of these networks, for ``nn.Module.apply``.

    Args:
        module: Of the network.
        needs_reset: Also reset what draws its own when it is made: points, norms, 1-D shortcuts.
    """
    if isinstance(module, (CausalConv1d, nn.Conv2d)):
        if module.weight.is_meta:  # nothing to fill, and 6 ms for each tensor on a CPU
            return
        nn.init.trunc_normal_(module.weight, std=.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif needs_reset and callable(reset_parameters := getattr(module, 'reset_parameters', None)):
        reset_parameters()
