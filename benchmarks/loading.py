#!/usr/bin/env python3
"""What pretrained weights cost beside the model and the file alone.

    python benchmarks/loading.py [--model smpconv_t] [--rounds 11]

In one run, from a cache of the Hub's client that holds the model's own initial weights, offline: creating the model
with pretrained=True (checksum, a look into the file, timm's loading), beside creating it and reading the same file
with safetensors' load_file. The weights are compared first. Appends to benchmarks/results/loading.jsonl.
"""
import argparse
import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Dict

import measure
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import smpconv_models


def fill(cache: str, model: torch.nn.Module) -> Path:
    """The model's weights as the Hub's client keeps them; the path that leads to them."""
    repository = Path(cache, 'models--' + model.pretrained_cfg['hf_hub_id'].replace('/', '--'))
    commit = '0' * 40
    for folder in ('blobs', 'refs', f'snapshots/{commit}'):
        (repository / folder).mkdir(parents=True)
    (repository / 'refs/main').write_text(commit)
    save_file(model.state_dict(), repository / 'blobs/new')
    name = hashlib.sha256((repository / 'blobs/new').read_bytes()).hexdigest()
    (repository / 'blobs/new').rename(repository / 'blobs' / name)
    path = repository / 'snapshots' / commit / 'model.safetensors'
    path.symlink_to(f'../../blobs/{name}')
    return path


def time_loading(name: str, cache: str, rounds: int) -> Dict[str, float]:
    model = timm.create_model(name)
    path = fill(cache, model)

    def alone() -> torch.nn.Module:
        created = timm.create_model(name)
        load_file(path)
        return created

    def pretrained() -> torch.nn.Module:
        return timm.create_model(name, pretrained=True, cache_dir=cache)

    for key, value in pretrained().state_dict().items():
        if not torch.equal(value, model.state_dict()[key]):
            sys.exit(f'{key} is not what was saved: nothing is timed')
    return measure.interleaved({'alone': alone, 'pretrained': pretrained}, rounds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='smpconv_t', choices=['smpconv_t', 'smpconv_b'])
    parser.add_argument('--rounds', type=int, default=11)
    args = parser.parse_args()
    constants.HF_HUB_OFFLINE = True
    with tempfile.TemporaryDirectory() as cache:
        seconds = time_loading(args.model, cache, args.rounds)
    for name, value in seconds.items():
        print(f'{name:12} {value * 1e3:8.1f} ms   {value / seconds["alone"]:.3f} x creating and load_file')
    measure.append(measure.RESULTS / 'loading.jsonl', {
        'model': args.model, 'seconds': seconds, 'version': smpconv_models.__version__})
    return 0


if __name__ == '__main__':
    sys.exit(main())
