"""Depthwise layers to measure, by name, on the maps of 224x224 images unless the name has another size."""
from dataclasses import dataclass
from typing import List, Optional, Sequence


@dataclass(frozen=True)
class Case:
    """Depthwise layer with a square kernel on a map of ``height`` x ``width``; ``network`` has it ``times`` times."""
    name: str
    channels: int
    height: int
    width: int
    kernel: int
    network: Optional[str] = None
    times: int = 0
    batch: Optional[int] = None  # None: the batch size of the run


def _stages(
        prefix: str,
        network: Optional[str],
        channels: Sequence[int],
        kernels: Sequence[int],
        times: Sequence[int],
        batch: Optional[int] = None,
) -> List[Case]:
    return [
        Case(f'{prefix}_{size}', c, size, size, k, network, t, batch)
        for size, c, k, t in zip((56, 28, 14, 7), channels, kernels, times)
    ]


T, B, MOBILE = (96, 192, 384, 768), (128, 256, 512, 1024), (64, 128, 256, 320)

CASES = {case.name: case for case in [
    *_stages('t', 'smpconv_t', T, (31, 29, 27, 13), (2, 2, 8, 2)),
    *_stages('b', 'smpconv_b', B, (31, 29, 27, 13), (2, 2, 20, 2)),
    *_stages('mobile51', 'smpconv_mobile51', MOBILE, (51, 49, 47, 13), (2, 2, 2, 2)),
    *_stages('convnext', 'convnext_tiny', T, (7, 7, 7, 7), (3, 3, 9, 3)),
    *_stages('t_batch1', None, T, (31, 29, 27, 13), (0, 0, 0, 0), batch=1),
    # the first two stages on images of 800x1216, a usual size in detection
    Case('detection_200x304', 96, 200, 304, 31, batch=1),
    Case('detection_100x152', 192, 100, 152, 29, batch=1),
    # T's stem, and the 5x5 branches beside its large kernels
    Case('k3_112', 96, 112, 112, 3),
    Case('k5_56', 96, 56, 56, 5),
    Case('k5_28', 192, 28, 28, 5),
    Case('k5_14', 384, 14, 14, 5),
    Case('k5_7', 768, 7, 7, 5),
]}
