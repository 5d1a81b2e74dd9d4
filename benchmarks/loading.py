#!/usr/bin/env python3
"""Measure the cost of pretrained weights against creating the model and reading the file.

    python benchmarks/loading.py [--model smpconv_t] [--rounds 11]

The benchmark fills a cache of the Hub's client with the model's own initial weights and runs offline. It measures the
creation of the model with pretrained=True, which includes checksum, validation and timm's loading. In the same run it
measures creating the model and reading the same file with safetensors' load_file. Both are repeated for features
and for 10 classes. The weights are compared first. Appends to benchmarks/results/loading.jsonl.
"""
import argparse
import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, Tuple

import measure
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import smpconv_models

KWARGS: Tuple[Dict[str, Any], ...] = ({}, {'features_only': True}, {'num_classes': 10})


def fill(cache: str, model: torch.nn.Module) -> Path:
    """Store the model's weights in the layout of the Hub's cache, and return the path of the file."""
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


def time_loading(name: str, path: Path, cache: str, rounds: int, kwargs: Dict[str, Any]) -> Dict[str, float]:
    def alone() -> torch.nn.Module:
        created = timm.create_model(name, **kwargs)
        load_file(path)
        return created

    def pretrained() -> torch.nn.Module:
        return timm.create_model(name, pretrained=True, cache_dir=cache, **kwargs)

    # features have stages_0 for stages.0
    saved = {key.replace('_', '.'): value for key, value in load_file(path).items()}
    for key, value in pretrained().state_dict().items():
        is_new = key.startswith('head') and 'num_classes' in kwargs
        if not is_new and not torch.equal(value, saved[key.replace('_', '.')]):
            sys.exit(f'{key} differs from the saved weights: nothing is timed')
    return measure.interleaved({'alone': alone, 'pretrained': pretrained}, rounds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='smpconv_t', choices=['smpconv_t', 'smpconv_b'])
    parser.add_argument('--rounds', type=int, default=11)
    args = parser.parse_args()
    constants.HF_HUB_OFFLINE = True
    with tempfile.TemporaryDirectory() as cache:
        path = fill(cache, timm.create_model(args.model))
        for kwargs in KWARGS:
            seconds = time_loading(args.model, path, cache, args.rounds, kwargs)
            alone, pretrained = (value * 1e3 for value in seconds.values())
            print(
                f'{args.model} {kwargs}: {pretrained:.1f} ms, '
                f'{pretrained / alone:.3f} x the {alone:.1f} ms of creating and load_file')
            measure.append(measure.RESULTS / 'loading.jsonl', {
                'model': args.model, 'kwargs': kwargs, 'seconds': seconds, 'version': smpconv_models.__version__})
    return 0


if __name__ == '__main__':
    sys.exit(main())
