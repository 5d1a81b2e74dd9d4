"""Networks small enough to compute with, and the arguments of the golden ones."""
import timm
from common import randomize_

import smpconv_models  # noqa: F401 (registers the models)

TINY = dict(
    depths=(1, 1, 2, 1), dims=(8, 12, 16, 20), kernel_sizes=(9, 7, 5, 5), small_kernel_size=3,
    mlp_ratio=2., num_classes=7,
)
GOLDEN = dict(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), kernel_sizes=(13, 11, 9, 7), num_classes=10)
GOLDEN_MOBILE = dict(GOLDEN, kernel_sizes=(19, 15, 11, 7))


def tiny(**kwargs):
    return timm.create_model('smpconv_t', **dict(TINY, **kwargs))


def network(**kwargs):
    """A tiny network in evaluation mode, with parameters and statistics that are not trivial."""
    return randomize_(tiny(**kwargs)).eval()
