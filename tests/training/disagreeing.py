"""train.py, where the second process measures less of the second epoch than the first one: streams may differ so."""
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import train
from smpconv_models.training import DistributedContext

loop = importlib.import_module('smpconv_models.training.train')  # its package has a function of this name
evaluate = loop.evaluate


def worse(model, images, device, args, description, **options):
    metrics = evaluate(model, images, device, args, description, **options)
    worse.calls += 1
    if DistributedContext.from_environment().rank == 1 and worse.calls > 2:  # twice an epoch
        metrics['top1'] = 0.
    elif worse.calls > 2:
        metrics['top1'] = 100.
    return metrics


worse.calls = 0
loop.evaluate = worse

if __name__ == '__main__':
    sys.exit(train.main())
