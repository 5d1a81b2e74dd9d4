"""List the registered models, their parameters and multiply-accumulates (MACs): `python -m smpconv_models [PATTERN]`.

MACs are those of one image of the model's default size: the difference between a batch of two and a batch of one. So
they exclude the sampling of the kernels, which is done once per batch.
"""
import argparse
import sys
from typing import Any, List, Optional

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_macs(model: nn.Module, *image_size: int) -> int:
    """Count the MACs of one image ``(C, H, W)``; the model must be on the meta device and in evaluation mode."""
    flops = []
    for batch in (1, 2):
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(batch, *image_size, device='meta'))
        flops.append(counter.get_total_flops())
    return (flops[1] - flops[0]) // 2


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m smpconv_models', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'pattern', nargs='?', default='smpconv*', help="pattern of names in timm's registry (default: %(default)s)")
    pattern = parser.parse_args(argv).pattern
    names = timm.list_models(pattern)
    if not names:
        sys.stderr.write(f'no model matches {pattern!r}; this package has {timm.list_models("smpconv*")}\n')
        return 2
    print(f'{"model":20}  {"parameters":>12}  {"MACs (G)":>9}  {"input":>13}')
    for name in names:
        model = timm.create_model(name, device='meta').eval()
        size: Any = timm.get_pretrained_cfg_value(name, 'input_size')
        parameters = sum(parameter.numel() for parameter in model.parameters())
        shape = 'x'.join(map(str, size))
        print(f'{name:20}  {parameters:12,}  {count_macs(model, *size) / 1e9:9.3f}  {shape:>13}')
    return 0


if __name__ == '__main__':
    import smpconv_models  # noqa: F401 (registers the models)
    from smpconv_models.utils import streams

    streams.keep_writable()
    sys.exit(main())
