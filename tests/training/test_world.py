"""What the environment says of the processes of a run."""
import pytest
from programs import refused

import train
from smpconv_models.training.distributed import DistributedContext


@pytest.mark.parametrize(('name', 'value', 'rest'), [
    ('WORLD_SIZE', 'x', {}),
    ('WORLD_SIZE', '', {}),
    ('WORLD_SIZE', '2.0', {}),
    ('SLURM_NTASKS', 'two', {}),
    ('RANK', 'x', {'WORLD_SIZE': '2'}),
    ('RANK', '-1', {'WORLD_SIZE': '2'}),
    ('LOCAL_RANK', 'x', {'WORLD_SIZE': '2', 'RANK': '0'}),
    ('MASTER_PORT', 'x', {'WORLD_SIZE': '2', 'RANK': '0'}),
])
def test_a_variable_that_is_no_number_is_one_line(name, value, rest, monkeypatch, capsys):
    for key, text in {name: value, **rest}.items():
        monkeypatch.setenv(key, text)
    assert refused(train.main, capsys) == (
        f'train.py: error: the environment variable {name} must be a whole number, got {value!r}')


@pytest.mark.parametrize(('environment', 'numbers'), [
    ({'RANK': '2', 'WORLD_SIZE': '2'}, 'RANK must be below WORLD_SIZE, got 2 and 2'),
    ({'RANK': '1'}, 'RANK must be below WORLD_SIZE, got 1 and 1'),
    ({'WORLD_SIZE': '0'}, 'RANK must be below WORLD_SIZE, got 0 and 0'),
    ({'SLURM_PROCID': '5', 'SLURM_NTASKS': '4'}, 'SLURM_PROCID must be below SLURM_NTASKS, got 5 and 4'),
])
def test_a_rank_that_cannot_be_is_refused(environment, numbers, monkeypatch):
    for key, text in environment.items():
        monkeypatch.setenv(key, text)
    with pytest.raises(ValueError, match=numbers):
        DistributedContext.from_environment()


def test_a_process_alone_does_not_ask_the_environment(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', 'x')
    world = DistributedContext()
    assert (world.size, world.rank, world.local_rank) == (1, 0, 0) and world.is_primary


def test_what_torchrun_and_slurm_set_is_read(monkeypatch):
    for key, text in {'WORLD_SIZE': '4', 'RANK': '3', 'LOCAL_RANK': '1', 'SLURM_NTASKS': 'x'}.items():
        monkeypatch.setenv(key, text)
    world = DistributedContext.from_environment()
    assert (world.size, world.rank, world.local_rank) == (4, 3, 1)
