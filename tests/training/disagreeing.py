"""train.py, where the second process measures less of the second epoch than the first one: streams may differ so."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import train
from smpconv_models.training import DistributedContext, trainer

evaluate = trainer.evaluate


def worse(*args, **options):
    metrics = evaluate(*args, **options)
    worse.calls += 1
    if DistributedContext.from_environment().rank == 1 and worse.calls > 2:  # twice an epoch
        metrics['top1'] = 0.
    elif worse.calls > 2:
        metrics['top1'] = 100.
    return metrics


worse.calls = 0
trainer.evaluate = worse

if __name__ == '__main__':
    sys.exit(train.main())
