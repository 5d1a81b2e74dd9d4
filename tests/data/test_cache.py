"""Tensors in a cache file: damaged files, locks, and folders that cannot be written."""
import os
import time

import pytest
import torch
from made_sequences import files_below, in_threads

from smpconv_models.data import cache
from smpconv_models.utils import download

TENSORS = {'a': torch.arange(6.).reshape(2, 3), 'b': torch.tensor(2.)}


def load(path, compute=lambda: dict(TENSORS), key='1'):
    found = cache.cached_tensors(path, key, compute)
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    return path


@pytest.mark.parametrize('change, told', [
    (lambda content: content[:50], 'cannot be read'),
    (lambda content: b'', 'cannot be read'),
    (lambda content: b'<html>' * 100, 'cannot be read'),
    (lambda content: content[:-1] + bytes([content[-1] ^ 1]), 'is damaged: its checksum differs'),
    (lambda content: (2 ** 62).to_bytes(8, 'little') + content[8:], 'cannot be read'),
])
def test_a_damaged_cache_is_recomputed_with_a_warning(tmp_path, caplog, change, told):
    path = load(tmp_path / 'cache.safetensors')
    path.write_bytes(change(path.read_bytes()))
    load(path)
    message, = caplog.messages
    assert f'{path} {told}' in message and 'recomputing it' in message and '\n' not in message
    load(path, lambda: pytest.fail('computed again'))
    assert files_below(tmp_path) == ['cache.safetensors']


def test_a_cache_of_another_key_is_recomputed(tmp_path):
    path = load(tmp_path / 'cache.safetensors')
    calls = []
    load(path, lambda: calls.append(1) or dict(TENSORS), key='2')
    load(path, lambda: pytest.fail('computed again'), key='2')
    assert calls == [1]


def test_a_cache_file_has_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        path = load(tmp_path / 'cache.safetensors')
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_one_of_several_processes_computes(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        time.sleep(0.2)
        return dict(TENSORS)

    in_threads(lambda: load(tmp_path / 'cache.safetensors', compute))
    assert calls == [1]


def test_a_failure_leaves_no_cache(tmp_path):
    def fail():
        raise ValueError('no')

    with pytest.raises(ValueError, match='no'):
        cache.cached_tensors(tmp_path / 'cache.safetensors', '1', fail)
    assert files_below(tmp_path) == []


@pytest.mark.parametrize('where', ['write', 'lock'])
def test_tensors_are_computed_if_the_cache_cannot_be_written(tmp_path, monkeypatch, caplog, where):
    def full(*args, **options):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'replace', full)
    if where == 'lock':
        monkeypatch.setattr(download.FileLock, 'acquire', full)
    load(tmp_path / 'cache.safetensors')
    assert 'cannot be written, and will be computed each time: No space left on device' in caplog.text
    assert files_below(tmp_path) == []
