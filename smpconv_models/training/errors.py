"""What went wrong, in one line that says what to do."""
import logging
import re
from argparse import Namespace
from typing import Optional

import torch
from torch import distributed as dist

from smpconv_models.utils.errors import first_line

from ..training.distributed import DistributedContext

_logger = logging.getLogger(__name__)

_NO_MEMORY = ('out of memory', 'not enough memory', "can't allocate memory", 'bad allocation', 'std::bad_alloc')
_NO_WORKER = ('dataloader worker (pid', 'dataloader timed out', 'shared memory', 'file </torch', 'bus error')
_NO_PEER = ('gloo', 'nccl', 'connection closed', 'connection reset', 'timed out', 'broken pipe')


def describe_error(error: Exception, args: Namespace, world: DistributedContext) -> Optional[str]:
    """A line for an error of the environment or the data; None for one that is a fault of the program.

    Args:
        error: What ended the run.
        args: Of the run, or of an evaluation.
        world: Whose processes may be the cause.
    """
    _logger.debug('the run has failed', exc_info=error)
    text, line = str(error).lower(), first_line(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in text for sign in _NO_MEMORY):
        less = 'a smaller --batch-size or --amp'
        if hasattr(args, 'global_batch_size'):  # a training run
            less = 'a smaller --batch-size with --global-batch-size kept, --amp or --grad-checkpointing'
        return f'out of memory with --batch-size {args.batch_size}: {line}; {less} needs less'
    if isinstance(error, RuntimeError) and any(sign in text for sign in _NO_WORKER):
        return (
            f'a process that loads images is gone: {line}; memory or shared memory (/dev/shm) may be full: '
            f'try fewer --workers than {args.workers}')
    if world.size > 1 and isinstance(error, (dist.DistError, RuntimeError)) and any(sign in text for sign in _NO_PEER):
        cause = re.sub(r'^\[\S+\] ', '', line).split('. ')[0]  # without the library's file and its advice
        return f'process {world.rank} waited for the others in vain ({world.unresponsive_ranks()}): {cause}'
    if isinstance(error, (FloatingPointError, OSError, ValueError)):
        return line
    return None
