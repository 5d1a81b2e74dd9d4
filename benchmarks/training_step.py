"""Whole training steps: smpconv_t, the same network with plain convolutions, and timm's convnext_tiny.

channels_last; float32 on the CPU, bfloat16 autocast on CUDA. A step is forward, backward and AdamW.
"""
import copy
from typing import Any, Callable, Dict, Optional, Tuple

import measure
import timm
import torch
import torch.nn.functional as F
from check import WrongResultError, relative_error
from torch import Tensor, nn

import smpconv_models

OURS, PLAIN, OTHER = 'smpconv_t', 'smpconv_t, F.conv2d', 'convnext_tiny'
CHECKED_IMAGES = 2


def run(batch: int, device: torch.device, rounds: int, seconds: float) -> Dict[str, Any]:
    """Measure the step of each network and return a row.

    Raises:
        WrongResultError: If the error of the gradients against float64 is above twice that of plain convolutions.
    """
    networks = make_networks(device)
    check_gradients(networks, device)
    images, labels = random_images(batch, device)
    steps = {name: make_step(network, images, labels) for name, network in networks.items()}
    dtype = 'bfloat16 autocast' if device.type == 'cuda' else 'float32'
    return {
        'batch': batch, 'dtype': dtype, 'optimizer': 'adamw',
        'seconds': measure.interleaved(steps, rounds, seconds, device),
    }


def text(row: Dict[str, Any]) -> str:
    seconds = row['seconds']
    lines = [f'training step, {row["dtype"]}, batch {row["batch"]}']
    for name, value in seconds.items():
        lines.append(
            f'{name:22} {value * 1e3:9.1f} ms {row["batch"] / value:9.1f} images/s   '
            f'{value / seconds[PLAIN]:.2f} x plain   {value / seconds[OTHER]:.2f} x {OTHER}')
    return '\n'.join(lines)


def make_networks(device: Any) -> Dict[str, nn.Module]:
    """Create the networks without stochastic depth, which would vary the amount of work."""
    ours = timm.create_model('smpconv_t', drop_path_rate=0., device=device)
    networks = {OURS: ours, PLAIN: with_plain_convolutions(ours), OTHER: timm.create_model(OTHER, device=device)}
    return {name: network.train().to(memory_format=torch.channels_last) for name, network in networks.items()}


def with_plain_convolutions(model: nn.Module) -> nn.Module:
    """Return a copy with the same weights in which every layer of this package calls ``F.conv2d``."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, (smpconv_models.SMPDepthwiseConv2d, smpconv_models.DepthwiseConv2d)):
            module.backend = 'reference'
    return model


def check_gradients(networks: Dict[str, nn.Module], device: torch.device) -> None:
    """Check the gradients of all weights together, for few images, so that float64 takes seconds."""
    images, labels = random_images(CHECKED_IMAGES, device)
    exact = _gradients(copy.deepcopy(networks[PLAIN]).double(), images.double(), labels)
    ours, plain = (
        relative_error(_gradients(networks[name], images, labels).double(), exact) for name in (OURS, PLAIN))
    if not ours <= 2 * plain:  # also for NaN
        raise WrongResultError(
            f'gradients of {OURS} are wrong: relative error {ours:.1e}, with plain conv2d {plain:.1e}')


def _gradients(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    gradients = torch.autograd.grad(_loss(network, images, labels), list(network.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def random_images(batch: int, device: torch.device, size: int = 224) -> Tuple[Tensor, Tensor]:
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(1000, (batch,), device=device)


def _loss(network: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    lowers = images.device.type == 'cuda' and images.dtype == torch.float32
    with torch.autocast(images.device.type, torch.bfloat16, enabled=lowers):
        return F.cross_entropy(network(images), labels)


def make_step(
        network: nn.Module, images: Tensor, labels: Tensor,
        call: Optional[Callable[[Tensor], Tensor]] = None) -> Callable[[], None]:
    """Return a function that trains the network for one step.

    Args:
        network: Network to train.
        images: Images of each step.
        labels: Labels of each step.
        call: Function that computes the logits, such as the compiled network; by default the network.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        _loss(network if call is None else call, images, labels).backward()
        optimizer.step()

    return step
