"""The original release's names for weights, and ours.

The release is the code published with the paper (github.com/sangnekim/SMPConv). Its files are pickled dictionaries: of
the ImageNet models written by timm's CheckpointSaver, of the others by a trainer of its own, with the weights under
``model``.
"""
import re
from typing import Any, Callable, Dict, List, Tuple, Union

from torch import Tensor

StateDict = Dict[str, Tensor]
Rules = Tuple[Tuple[str, Union[str, Callable[[re.Match], str]]], ...]

# Release name -> ours, tried in order on every key. In the ImageNet models its blocks alternate in one list where ours
# pair up.
_IMAGENET: Rules = (
    (r'^transitions\.(\d+)\.(\d+)\.', lambda m: f'stages.{int(m[1]) + 1}.downsample.{m[2]}.'),
    (r'^stages\.(\d+)\.blocks\.(\d+)\.', lambda m: f'stages.{m[1]}.blocks.{int(m[2]) // 2}.{_branch(int(m[2]))}.'),
    (r'\.large_kernel\.smp\.', '.large_kernel.large.'),
    (r'\.large_kernel\.small_conv\.', '.large_kernel.small.'),
    (r'\.(prelkb_bn|preffn_bn|bn)\.', '.norm.'),
    (r'\.weight_coord$', '.coords'),
    (r'\.weights$', '.weight'),
    (r'^head\.', 'head.fc.'),
)

# Of the networks for sequences and small images: the parts of a block, or of the stem, whose parts have no prefix.
_SMALL: Rules = (
    (r'(^|\.)cconv(\d)\.(Kernel\.)?', r'\1conv\2.large.conv.'),
    (r'(^|\.)cconv(\d)s\.', r'\1conv\2.small.conv.'),
    (r'(^|\.)norm(\d)\.', r'\1conv\2.large.norm.'),
    (r'(^|\.)norm(\d)s\.', r'\1conv\2.small.norm.'),
    (r'^conv1\.', 'stem.'),
    (r'\.shortcut\.0\.', '.shortcut.'),
    (r'\.weight_coord$', '.coords'),
    (r'\.weights$', '.weight'),
    (r'\.train_length$', '._extra_state'),
    (r'^backbone\.', 'blocks.'),
    (r'^finallyr\.', 'head.'),
    (r'^out_layer\.', 'head.fc.'),
)


def _branch(index: int) -> str:
    return 'mixer' if index % 2 == 0 else 'ffn'


def is_original(state_dict: StateDict) -> bool:
    """Whether the names are those of one of the original release's models."""
    return any(key.endswith('.weight_coord') for key in state_dict)


def convert_original(state_dict: StateDict) -> StateDict:
    """A state dict of the original release under our names and shapes.

    What the files carry of the sampling grid (``kernel_coord``) is left out: it is computed here. The blocks of the
    network for small images, one list there, are divided where their channels change, as ours are. Tensors of shapes
    that the release hasn't keep them.
    """
    if any(key.endswith('.Kernel.weight_coord') for key in state_dict):
        return _from_small(state_dict)
    return _from_imagenet(state_dict)


def _from_imagenet(state_dict: StateDict) -> StateDict:
    converted = {}
    for key, tensor in state_dict.items():
        if key.endswith('.kernel_coord'):
            continue
        if key.endswith(('.weight_coord', '.weights')):
            tensor = tensor.squeeze(0)
        elif key.endswith('.radius'):
            tensor = tensor.flatten()
        converted[_renamed(key, _IMAGENET)] = tensor
    return converted


def _from_small(state_dict: StateDict) -> StateDict:
    places = _stages_of_blocks(state_dict)
    converted = {}
    for key, tensor in state_dict.items():
        if tensor.ndim > 1 and (key.endswith('.radius') or key == 'out_layer.weight'):
            tensor = tensor.flatten(1)
        name = re.sub(r'^blocks\.(\d+)\.', lambda m: places.get(int(m[1]), m[0]), key)
        converted[_renamed(name, _SMALL)] = tensor
    return converted


def _renamed(key: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def _stages_of_blocks(state_dict: StateDict) -> Dict[int, str]:
    """Where each block goes: ``stages.S.B.``, a stage for each run of blocks of the same channels."""
    pattern = re.compile(r'^blocks\.(\d+)\.cconv1\.Kernel\.radius$')
    widths = {int(found[1]): tensor.shape[:1] for key, tensor in state_dict.items() if (found := pattern.match(key))}
    places: Dict[int, str] = {}
    runs: List[Any] = []
    for block, width in sorted(widths.items()):
        if not runs or runs[-1][0] != width:
            runs.append([width, 0])
        places[block] = f'stages.{len(runs) - 1}.{runs[-1][1]}.'
        runs[-1][1] += 1
    return places
