"""Tensors that are computed once and kept in a file."""
import os
import time
from concurrent.futures import ThreadPoolExecutor

import made_sequences as made
import pytest
import torch

from smpconv_models.data import speech
from smpconv_models.utils import download

KEPT = {'a': torch.arange(6.).reshape(2, 3), 'b': torch.tensor(2.)}


def kept(path, make=lambda: dict(KEPT), key='1'):
    found = speech.cached_tensors(path, key, make)
    assert found.keys() == KEPT.keys() and all(torch.equal(found[name], KEPT[name]) for name in KEPT)
    return path


@pytest.mark.parametrize('change, message', [
    (lambda content: content[:50], 'cannot be read'),
    (lambda content: b'', 'cannot be read'),
    (lambda content: b'<html>' * 100, 'cannot be read'),
    (lambda content: content[:-1] + bytes([content[-1] ^ 1]), 'is damaged: its checksum differs'),
    (lambda content: (2 ** 62).to_bytes(8, 'little') + content[8:], 'cannot be read'),
])
def test_a_damaged_cache_is_computed_again_with_a_warning(tmp_path, caplog, change, message):
    path = kept(tmp_path / 'kept.safetensors')
    path.write_bytes(change(path.read_bytes()))
    kept(path)
    line, = caplog.messages
    assert f'{path} {message}' in line and 'recomputing it' in line and '\n' not in line
    kept(path, lambda: pytest.fail('made again'))
    assert made.below(tmp_path) == ['kept.safetensors']


def test_a_cache_of_another_key_is_computed_again(tmp_path):
    path = kept(tmp_path / 'kept.safetensors')
    made_again = []
    kept(path, lambda: made_again.append(1) or dict(KEPT), key='2')
    kept(path, lambda: pytest.fail('made again'), key='2')
    assert made_again == [1]


def test_the_file_has_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        path = kept(tmp_path / 'kept.safetensors')
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_one_of_many_processes_computes(tmp_path):
    calls = []

    def make():
        calls.append(1)
        time.sleep(0.2)
        return dict(KEPT)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: kept(tmp_path / 'kept.safetensors', make), range(3)))
    assert calls == [1]


def test_a_failure_leaves_no_cache(tmp_path):
    def fail():
        raise ValueError('no')

    with pytest.raises(ValueError, match='no'):
        speech.cached_tensors(tmp_path / 'kept.safetensors', '1', fail)
    assert made.below(tmp_path) == []


@pytest.mark.parametrize('where', ['write', 'lock'])
def test_if_the_file_cannot_be_written_tensors_are_computed_on_each_use(tmp_path, monkeypatch, caplog, where):
    def full(*args, **options):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'replace', full)
    if where == 'lock':
        monkeypatch.setattr(download.FileLock, 'acquire', full)
    kept(tmp_path / 'kept.safetensors')
    assert 'cannot be written, and is recomputed on each use: No space left on device' in caplog.text
    assert made.below(tmp_path) == []
