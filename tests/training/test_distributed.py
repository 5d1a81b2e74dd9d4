"""Two processes, over gloo on the CPU."""
import json
import resource
import signal
from pathlib import Path

import pytest
import torch
from launch import DIGITS, EVERYTHING, differences, finish, start, wait_for_step
from torch import nn

from smpconv_models.training.distributed import DistributedContext
from smpconv_models.training.validate import ClassificationMeter

COMMAND = [*EVERYTHING, '--recovery-interval', '1', '--dist-timeout', '60']


def run(*argv):
    """Both processes, which must succeed; what the first one printed."""
    ends = finish(start(argv, ranks=2))
    assert [code for code, _, _ in ends] == [0, 0], ends
    return ends[0][1]


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    output = tmp_path_factory.mktemp('straight')
    printed = run(*COMMAND, '--output', output, '--experiment', 'run')
    assert printed.count('best checkpoint') == 1
    return output / 'run'


def test_two_processes_compute_what_one_does_and_no_step_of_a_nan():
    ends = finish(start([], ranks=2, script=Path(__file__).with_name('two_ranks.py')))
    assert [code for code, _, _ in ends] == [0, 0], ends


@pytest.mark.slow  # half a minute: three jobs of two processes
def test_a_dead_process_ends_the_others_and_the_same_command_resumes_to_the_same_bits(straight, tmp_path):
    command = [*COMMAND, '--output', tmp_path, '--experiment', 'run']
    first, second = start(command, ranks=2)
    wait_for_step(first, 1, 3)
    second.kill()
    (code, _, error), _ = finish([first, second])
    assert code == 1
    line = error.strip().splitlines()[-1]
    assert line.startswith('train.py: error: rank 0 timed out waiting for other ranks')
    assert '(no response from rank 1)' in line
    printed = run(*command)
    assert f'resuming from {tmp_path / "run/last.pth.tar"}: epoch 1, step' in printed
    assert differences(straight, tmp_path / 'run') == []
    state = torch.load(straight / 'last.pth.tar', weights_only=True)
    assert state['args']['global_batch_size'] == 128 and state['optimizer']['state'][0]['step'] == 22


@pytest.mark.slow  # two pairs of processes
def test_processes_that_measure_differently_go_on_together(tmp_path):
    """By what the first one measured: each would else decide on its own which epoch is the best."""
    script = Path(__file__).with_name('disagreeing.py')
    ends = finish(start([*COMMAND, '--output', tmp_path, '--dist-timeout', 20], ranks=2, script=script))
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert torch.load(tmp_path / 'smpconv_nano/model_best.pth.tar', weights_only=True)['metric'] == 100


@pytest.mark.slow  # it waits for what doesn't come
def test_a_process_that_hangs_is_named_in_time(tmp_path):
    first, second = start([*COMMAND, '--dist-timeout', 4, '--output', tmp_path, '--epochs', 50], ranks=2)
    wait_for_step(first, 0, 2)
    second.send_signal(signal.SIGSTOP)
    (code, _, error), = finish([first])
    second.kill()
    second.communicate()
    assert code == 1 and '(no response from rank 1): Timed out waiting 4000ms' in error


@pytest.mark.slow  # two pairs of processes; a lost one is in the default suite
def test_both_processes_stop_at_the_same_step_when_one_is_asked(straight, tmp_path):
    command = [*COMMAND, '--output', tmp_path, '--experiment', 'run', '--recovery-interval', 1000]
    first, second = start(command, ranks=2)
    wait_for_step(first, 0, 5)
    second.terminate()
    ends = finish([first, second])
    assert [code for code, _, _ in ends] == [143, 143], ends
    assert all('stopped by SIGTERM; the same command resumes the run' in error for _, _, error in ends)
    assert torch.load(tmp_path / 'run/last.pth.tar', weights_only=True)['progress']['step'] >= 5
    run(*command)
    assert differences(straight, tmp_path / 'run') == []


@pytest.mark.slow  # half a minute: two processes
def test_a_short_run_is_evaluated_as_it_is_trained(tmp_path):
    """Statistics that were recalibrated by both processes, and an EMA that follows."""
    run(*DIGITS, '--epochs', 2, '--model-ema', '--batch-size', 32, '--output', tmp_path)
    row = json.loads((tmp_path / 'run/summary.json').read_text())
    assert row['processes'] == 2 and row['global_batch_size'] == 64 and row['top1'] > 80


@pytest.mark.slow  # 10 s: two processes
def test_an_error_of_one_process_is_reported(tmp_path):
    """Also where the others wait for it."""
    argv = [*COMMAND, '--output', tmp_path, '--dist-timeout', 3]
    first, second = start(argv, ranks=2, more={1: ['--device', 'cuda']})
    ends = finish([second, first])
    assert [code for code, _, _ in ends] == [2, 2]
    assert '--device cuda' in ends[0][2] and '(rank 1)' in ends[0][2]


@pytest.mark.slow  # 8 s: two processes
def test_a_full_disk_ends_both_processes_alike(tmp_path):
    limit = resource.RLIMIT_FSIZE, (100_000, 100_000)
    ends = finish(start([*COMMAND, '--output', tmp_path], ranks=2, preexec_fn=lambda: resource.setrlimit(*limit)))
    assert [code for code, _, _ in ends] == [1, 1], ends
    assert all('error: no space: a checkpoint needs' in error for _, _, error in ends)


# --- evaluation; two_ranks.py holds that the sums of two ranks are those of one ---


def test_metrics_are_those_of_all_samples():
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(50, 4, generator=generator), torch.randint(0, 4, (50,), generator=generator)
    meter = ClassificationMeter(torch.device('cpu'), 4)
    for start_at in range(0, 50, 7):
        meter.add(logits[start_at:start_at + 7], target[start_at:start_at + 7])
    result = meter.result(DistributedContext())
    assert result['count'] == 50 and result['top5'] == 100
    assert result['top1'] == pytest.approx(100 * (logits.argmax(1) == target).double().mean().item(), abs=1e-9)
    assert result['loss'] == pytest.approx(nn.functional.cross_entropy(logits, target).item(), rel=1e-5)
    expected = torch.zeros(4, 4, dtype=torch.int64)
    for true, guess in zip(target, logits.argmax(1)):
        expected[true, guess] += 1
    assert torch.equal(result['confusion'], expected)
