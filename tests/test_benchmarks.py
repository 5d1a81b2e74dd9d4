"""Benchmarks: their cases, their checks before timing, their reports and command lines."""
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import smpconv_models

BENCHMARKS = Path(__file__).parents[1] / 'benchmarks'
TINY = ['--device', 'cpu', '--batch-size', '1', '--rounds', '1']


@pytest.fixture
def load(monkeypatch):
    """Import a module of benchmarks/ by name, like a script there."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture(autouse=True)
def settings():
    """Restore the settings of PyTorch that a benchmark changes."""
    cudnn = torch.backends.cudnn
    before, threads = (cudnn.benchmark, cudnn.conv.fp32_precision), torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    cudnn.benchmark, cudnn.conv.fp32_precision = before


# --- the cases ---


def large_depthwise_layers(name):
    """Return how often a network has each large depthwise layer (channels, height, width, kernel)."""
    with torch.device('meta'):
        network = timm.create_model(name).eval()
    found = []

    def note(module, args, output):
        kernel = module.kernel_size if isinstance(module.kernel_size, int) else module.kernel_size[0]
        found.append((*output.shape[1:], kernel))

    for module in network.modules():
        is_plain = type(module) is nn.Conv2d and module.groups == module.in_channels and module.stride == (1, 1)
        if isinstance(module, smpconv_models.SMPDepthwiseConv2d) or (name == 'convnext_tiny' and is_plain):
            module.register_forward_hook(note)
    network(torch.empty(1, 3, 224, 224, device='meta'))
    return Counter(found)


@pytest.mark.parametrize('network', ['smpconv_t', 'smpconv_b', 'smpconv_mobile51', 'convnext_tiny'])
def test_cases_are_the_layers_of_the_networks(load, network):
    cases = [case for case in load('cases').CASES.values() if case.network == network]
    assert {(case.channels, case.height, case.width, case.kernel): case.times for case in cases} \
        == large_depthwise_layers(network)


def test_every_network_is_compared_with_the_real_one(load):
    assert {case.network for case in load('cases').CASES.values()} \
        == {'smpconv_t', 'smpconv_b', 'smpconv_mobile51', 'convnext_tiny', None}


# --- the check ---


@pytest.mark.parametrize('layout', ['nchw', 'nhwc'])
@pytest.mark.parametrize('name', ['plain', 'auto'])
def test_a_path_keeps_its_layout(load, name, layout):
    layer = load('layer')
    inputs = layer.make_inputs(load('cases').Case('tiny', 20, 9, 7, 5), 2, torch.float32, torch.device('cpu'))
    y, dx, dw = layer.paths([], *inputs)[f'{name}/{layout}']['all']()
    assert y.shape == dx.shape and dw.shape == inputs[1].shape
    assert all(tensor.is_contiguous(memory_format=layer.FORMATS[layout]) for tensor in (y, dx))
    assert not all(tensor.is_contiguous(memory_format=other) for tensor in (y, dx)
                   for key, other in layer.FORMATS.items() if key != layout)


def scaled(x, weight):
    return smpconv_models.depthwise_conv2d(x, weight * 1.0001)


def without_input_gradient(x, weight):
    return smpconv_models.depthwise_conv2d(x.detach() + 0 * x, weight)


def without_weight_gradient(x, weight):
    return smpconv_models.depthwise_conv2d(x, weight.detach() + 0 * weight)


def with_one_nan(x, weight):
    y = smpconv_models.depthwise_conv2d(x, weight)
    nan = torch.zeros_like(y)
    nan[0, 1, 0, 0] = float('nan')  # in a channel that is not compared
    return y + nan


@pytest.mark.parametrize(('wrong', 'result'), [
    (scaled, 'y'), (without_input_gradient, 'dx'), (without_weight_gradient, 'dw'), (with_one_nan, 'y'),
])
@pytest.mark.parametrize('layout', ['nchw', 'nhwc'])
def test_a_wrong_function_is_found(load, wrong, result, layout):
    torch.manual_seed(0)
    layer, check = load('layer'), load('check')
    case = load('cases').Case('tiny', 20, 9, 7, 5)
    inputs = layer.make_inputs(case, 2, torch.float32, torch.device('cpu'))
    paths = layer.paths([], *inputs)
    assert set(check.check(paths, *inputs)) == {'plain/nchw', 'plain/nhwc', 'auto/nchw', 'auto/nhwc'}
    x, weight, grad = (tensor.contiguous(memory_format=layer.FORMATS[layout]) for tensor in inputs)
    paths[f'auto/{layout}'] = layer.functions(wrong, x, weight, grad)
    with pytest.raises(check.WrongResultError, match=f'{result} of auto/{layout} is wrong: relative error .*, limit'):
        check.check(paths, *inputs)


def test_a_wrong_function_is_not_timed(load, monkeypatch, tmp_path, capsys):
    op = smpconv_models.depthwise_conv2d
    monkeypatch.setattr(smpconv_models, 'depthwise_conv2d', lambda x, weight, backend: 2 * op(x, weight))
    monkeypatch.setattr(load('measure'), 'interleaved', lambda *args: pytest.fail('it was timed'))
    assert load('depthwise').main(['--cases', 'k5_7', *TINY, '--results', str(tmp_path)]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith('depthwise.py: error: k5_7, float32: y of auto/nchw is wrong: relative error 1.0e+00')
    assert not list(tmp_path.iterdir())


def test_networks_differ_in_the_convolution_alone(load):
    networks = load('training_step').make_networks('meta')
    ours, plain, other = networks.values()
    layers = (smpconv_models.SMPDepthwiseConv2d, smpconv_models.DepthwiseConv2d)
    for network, backend in ((ours, 'auto'), (plain, 'reference')):
        found = [module.backend for module in network.modules() if isinstance(module, layers)]
        assert found == [backend] * 28
    assert ours.state_dict().keys() == plain.state_dict().keys()
    assert not any(isinstance(module, layers) for module in other.modules())


# --- the numbers ---


@pytest.mark.parametrize(('size', 'kernel', 'products'), [
    (56, 31, 1051), (28, 29, 859), (14, 27, 196), (7, 13, 49),
])
def test_products_of_the_floor(load, size, kernel, products):
    """The expected numbers were counted separately, block by block."""
    assert round(load('floors').products_per_output(size, size, kernel)) == products


def test_floors(load):
    seconds = load('floors').seconds
    assert seconds(64, 96, 56, 56, 31) == pytest.approx(51e-6, rel=0.02)  # bound by products
    assert seconds(64, 384, 14, 14, 27) == pytest.approx(4.5e-6, rel=0.02)  # by bytes


def row(case, seconds, **changes):
    return {
        'case': case.name, 'network': case.network, 'times': case.times, 'batch': 2, 'channels': case.channels,
        'height': case.height, 'width': case.width, 'kernel': case.kernel, 'dtype': 'float32', 'seconds': {
            path: dict.fromkeys(('y', 'dx', 'dw', 'all'), value) for path, value in seconds.items()},
        **changes,
    }


def test_sums_weigh_each_layer(load):
    cases, report = load('cases').CASES, load('report')
    seconds = {'plain/nchw': 6., 'plain/nhwc': 4., 'auto/nchw': 2., 'auto/nhwc': 1.}
    rows = [row(case, seconds) for case in cases.values() if case.network == 'smpconv_t']
    total, = report.sums([*rows, row(cases['k3_112'], seconds), row(cases['b_56'], seconds)])
    assert total['seconds']['plain/nchw']['dw'] == 14 * 6
    assert report.speed_up(total, 'y', 'nhwc') == 4
    assert report.floor_seconds(total, 'y') > 8 * report.floor_seconds(rows[2], 'y')


def test_slower_results_are_marked(load):
    case, report = load('cases').CASES['t_56'], load('report')
    fast = row(case, {'plain/nchw': 6., 'plain/nhwc': 4., 'auto/nchw': 5., 'auto/nhwc': 4.1})
    slow = row(case, {'plain/nchw': 6., 'plain/nhwc': 4., 'auto/nchw': 5., 'auto/nhwc': 4.4})
    fast_line, slow_line = report.verdicts([fast, slow]).splitlines()[1:]
    assert slow_line.split()[-1] == 'SLOWER' and 'SLOWER' not in fast_line
    assert fast_line.split()[3:5] == ['1.25', '1.02']


def test_cuda_shows_floors_and_named_backends(load):
    case, report = load('cases').CASES['t_56'], load('report')
    seconds = {'plain/nchw': 6e-4, 'plain/nhwc': 4e-4, 'auto/nchw': 1e-4, 'auto/nhwc': 2e-4,
               'triton/nchw': 1e-4, 'triton/nhwc': 2e-4}
    rows = [row(case, seconds, dtype='bfloat16', batch=64, cuda='13.2')]
    heading, y, *_ = report.times(rows).splitlines()
    assert heading.startswith('bfloat16, us') and 'H200 floor' in heading
    floor, *shares = y.split()[-3:]
    assert round(float(floor)) == 51 and shares == ['51%', '26%']
    heading, line = report.verdicts(rows).splitlines()
    assert 'triton/nchw/better: y, dx, dw, all' in heading and '0.25  0.25  0.25  0.25' in line


def test_a_slow_function_drops_out_after_three_rounds(load, monkeypatch):
    measure, calls = load('measure'), Counter()

    def slow():
        calls['slow'] += 1

    def fast():
        calls['fast'] += 1

    def stopwatch(function):
        function()
        return 1. if function is slow else 1e-3
    monkeypatch.setattr(measure, '_stopwatch', lambda device, clock: stopwatch)
    medians = measure.interleaved({'slow': slow, 'fast': fast}, rounds=50, seconds=0.1)
    assert medians == {'slow': 1., 'fast': 1e-3}
    assert calls == {'slow': 1 + 3, 'fast': 1 + 50}


def test_the_clock_of_the_process_leaves_out_waiting(load):
    measure = load('measure')
    functions = {'waiting': lambda: time.sleep(0.1)}
    assert measure.interleaved(functions, rounds=3)['waiting'] >= 0.1
    assert measure.interleaved(functions, rounds=3, clock=time.process_time)['waiting'] < 0.05


# --- the command line ---


@pytest.mark.slow  # 12 s of measuring
def test_a_run_of_one_case_stores_its_row(tmp_path):
    command = [sys.executable, BENCHMARKS / 'depthwise.py', '--cases', 'k5_7', *TINY, '--dtypes', 'float32', 'bfloat16',
               '--backends', 'reference', '--results', tmp_path, '--picture', tmp_path / 'speed.png']
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count('k5_7: 1x768x7x7 k5') == 4
    rows = [json.loads(line) for line in (tmp_path / 'depthwise.jsonl').read_text().splitlines()]
    assert [row['dtype'] for row in rows] == ['float32', 'bfloat16']
    for row in rows:
        assert {'date', 'device', 'torch', 'case', 'batch', 'channels', 'height', 'width', 'kernel'} <= set(row)
        paths = {f'{name}/{layout}' for name in ('plain', 'auto', 'reference') for layout in ('nchw', 'nhwc')}
        assert set(row['seconds']) == set(row['errors']) == paths
        assert all(set(times) == {'y', 'dx', 'dw', 'all'} for times in row['seconds'].values())
        assert all(value > 0 for times in row['seconds'].values() for value in times.values())
    assert (tmp_path / 'speed.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(('script', 'arguments', 'message'), [
    ('depthwise', ['--cases', 'nothing'], "invalid choice: 'nothing' (choose from 't_56', "),
    ('depthwise', ['--device', 'cuda'], 'finds no such device'),
    ('depthwise', ['--device', 'cpu', '--backends', 'nothing'], 'got nothing'),
    ('depthwise', ['--rounds', '0'], 'must be above 0'),
    ('depthwise', ['--results', __file__], '--results'),
    ('depthwise', ['--picture', f'{__file__}/picture.png'], '--picture'),
    ('depthwise', ['--picture', 'picture.nothing'], '--picture'),
    ('gpu', ['--phase', 'nothing'], "invalid choice: 'nothing' (choose from 'check', "),
    ('gpu', ['--device', 'cpu'], '--device cpu needs --dry-run'),
    ('gpu', ['--device', 'cuda', '--dry-run'], '--dry-run runs on the CPU: remove --device cuda'),
    ('gpu', ['--minutes', '0'], 'must be above 0, got 0'),
    ('gpu', ['--results', __file__], '--results cannot be written'),
    ('gpu', ['--prediction', 'nothing.jsonl'], 'nothing.jsonl cannot be read'),
    ('cifar_step', ['--networks', 'flexible'], "invalid choice: 'flexible'"),
    ('cifar_step', ['--device', 'cuda'], 'finds no such device'),
    ('cifar_step', ['--rounds', '0'], 'must be above 0'),
    ('cifar_step', ['--results', __file__], '--results cannot be written'),
    ('acceleration', ['--networks', 'nothing'], "invalid choice: 'nothing'"),
    ('acceleration', ['--device', 'cuda'], 'finds no such device'),
    ('acceleration', ['--seconds', '0'], 'must be above 0'),
    ('acceleration', ['--threads', '2', '--clock', 'process'], '--clock process takes one thread'),
    ('acceleration', ['--results', __file__], '--results cannot be written'),
])
def test_errors_are_one_line(load, monkeypatch, capsys, script, arguments, message):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit) as exit:
        load(script).main(arguments)
    output = capsys.readouterr()
    assert (exit.value.code, output.out, output.err.count('\n')) == (2, '', 1)
    assert message in output.err


# --- the network for CIFAR10 ---


TINY_CIFAR = ['--batch-size', '2', '--img-size', '8', '--rounds', '1']


def test_networks_for_cifar_are_those_of_the_paper(load):
    script = load('cifar_step')
    with torch.device('meta'):
        counts = {name: script.count(script.make_network(name)) for name in script.NAMES}
    assert {name: f'{count / 1e6:.2f}M' for name, count in counts.items() if name in script.PAPER} \
        == {name: paper.parameters for name, paper in script.PAPER.items()}


@pytest.mark.slow  # deformable networks on a CPU: 20 s
def test_cifar_step_stores_a_row_and_prints_the_table(load, tmp_path, capsys):
    names = ['SMPConv', 'plain 3x3', 'deformable 3x3']
    assert load('cifar_step').main([*TINY_CIFAR, '--results', str(tmp_path), '--networks', *names]) == 0
    row, = (json.loads(line) for line in (tmp_path / 'cifar_step.jsonl').read_text().splitlines())
    assert {'date', 'device', 'torch'} <= set(row) and (row['batch'], row['img_size']) == (2, 8)
    for key in ('seconds', 'evaluation_seconds', 'parameters'):
        assert list(row[key]) == names and all(value > 0 for value in row[key].values())
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith('| SMPConv | 489,646 |') and lines[2].endswith('| 1.00 | 4258.4 | 1.00 |')
    expected = row['seconds']['deformable 3x3'] / row['seconds']['SMPConv']
    assert lines[4].split(' | ')[3] == f'{expected:.2f}' and ' | 61.2 | 1.53 | 4390.7 | 1.03 |' in lines[4]


def test_a_wrong_network_for_cifar_is_not_timed(load, monkeypatch, tmp_path, capsys):
    script, right = load('cifar_step'), load('cifar_step').Deformable.forward
    monkeypatch.setattr(load('measure'), 'interleaved', lambda *args, **kwargs: pytest.fail('it was timed'))
    monkeypatch.setattr(script.Deformable, 'forward', lambda self, x: 1.0001 * right(self, x))
    arguments = [*TINY_CIFAR, '--results', str(tmp_path), '--networks']
    assert script.main([*arguments, 'deformable 3x3']) == 1
    assert 'error: deformable 3x3 is wrong: relative error 1.0e-04' in capsys.readouterr().err
    fft = smpconv_models.layers.fft_conv._fft_conv
    monkeypatch.setattr(smpconv_models.layers.fft_conv, '_fft_conv', lambda *args: 1.001 * fft(*args))
    assert script.main([*arguments, 'SMPConv']) == 1
    assert 'error: SMPConv by fft is wrong' in capsys.readouterr().err and not list(tmp_path.iterdir())


# --- accelerated networks ---


SMALL_NETWORKS = ['--batch-size', '2', '--img-size', '32', '--frames', '16', '--rounds', '1', '--layer-rounds', '1']


def test_timm_has_the_networks_of_the_acceleration(load):
    networks = load('networks')
    assert all(timm.is_model(name) for name in networks.TIMM) and len(networks.NETWORKS) >= 20


@pytest.mark.slow  # 18 networks are created: 2 s
def test_networks_of_the_acceleration_have_depthwise_layers(load):
    networks = load('networks')
    for name in networks.TIMM:
        with torch.device('meta'):
            model = networks.NETWORKS[name].create()
        assert smpconv_models.accelerate_depthwise(model, min_kernel_size=3).replaced, name


@pytest.mark.slow  # transformers' networks are wide: 6 to 17 s
@pytest.mark.parametrize('name', ['wav2vec2_conformer', 'wav2vec2_bert', 'seamless_m4t', 'parakeet'])
def test_an_encoder_of_transformers_is_accelerated(load, tmp_path, name):
    pytest.importorskip('transformers')
    assert name in load('networks').TRANSFORMERS
    assert load('acceleration').main([*SMALL_NETWORKS, '--results', str(tmp_path), '--networks', name]) == 0
    row = json.loads((tmp_path / 'acceleration.jsonl').read_text())
    assert row['min_kernel_size']['7']['replaced'] == 2 and row['seconds']['nchw']['training']['7'] > 0


def test_transformers_must_be_installed_for_its_networks(load, monkeypatch, tmp_path, capsys):
    acceleration = load('acceleration')
    monkeypatch.setattr(acceleration.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit) as exit:
        acceleration.main(['--networks', 'vocos', 'parakeet', '--results', str(tmp_path)])
    message = capsys.readouterr().err
    assert exit.value.code == 2 and message.endswith('--networks parakeet: transformers is not installed\n')


def test_acceleration_stores_rows_and_prints_tables(load, tmp_path, capsys):
    arguments = [*SMALL_NETWORKS, '--results', str(tmp_path), '--networks', 'lcnet_100', 'f5_tts_text']
    assert load('acceleration').main(arguments) == 0
    images, sequences = (json.loads(line) for line in (tmp_path / 'acceleration.jsonl').read_text().splitlines())
    assert images['input'] == [2, 3, 32, 32] and sequences['input'] == [2, 512, 16]
    assert {size: (found['replaced'], found['copy']) for size, found in images['min_kernel_size'].items()} \
        == {'7': (0, 'before'), '5': (7, '5'), '3': (13, '3')}
    assert images['min_kernel_size']['5']['skipped'] == {'kernel 3x3 below 5': 6}
    assert list(images['seconds']) == ['nchw', 'nhwc'] and list(sequences['seconds']) == ['nchw']
    for modes in images['seconds'].values():
        assert all(list(seconds) == ['before', 'control', '5', '3'] for seconds in modes.values())
    assert sum(layer['times'] for layer in images['layers']) == 2 * 13
    layer, = sequences['layers']
    assert (layer['times'], layer['kernel'], layer['shape']) == (4, [7], [2, 512, 16])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith('| lcnet_100 | nchw | 0, 7, 13 | ') and ' | 1.00 | ' in lines[2]
    assert lines[4].startswith('| f5_tts_text | nchw | 4, 4, 4 | ')


@pytest.mark.parametrize(('wrong', 'result'), [
    (lambda right, x, weight, **options: right(x, 1.001 * weight, **options), 'output in inference, nchw is wrong'),
    (lambda right, x, weight, **options: right(x.detach() + 0 * x, weight, **options), 'gradient of the input'),
    (lambda right, x, weight, **options: right(x, weight.detach() + 0 * weight, **options), 'gradient of all param'),
])
def test_a_wrong_acceleration_is_not_timed(load, monkeypatch, tmp_path, capsys, wrong, result):
    right = smpconv_models.depthwise_conv1d
    monkeypatch.setattr(
        smpconv_models.layers.conv_norm, 'depthwise_conv1d',
        lambda x, weight, bias, **options: wrong(right, x, weight, bias=bias, **options))
    monkeypatch.setattr(load('measure'), 'interleaved', lambda *args: pytest.fail('it was timed'))
    arguments = [*SMALL_NETWORKS, '--results', str(tmp_path), '--networks', 'f5_tts_text']
    assert load('acceleration').main(arguments) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f'acceleration.py: error: f5_tts_text: {result}') and not list(tmp_path.iterdir())


def test_slower_networks_and_layers_are_listed(load):
    report = load('acceleration_report')
    seconds = {'before': 1., 'control': 1.05, '5': 0.5, '3': 1.25}
    layers = [{
        'layout': 'nchw', 'times': times, 'kernel': [kernel, kernel], 'stride': [1, 1], 'shape': [2, 8, 7, 7],
        'seconds': {'training': {'before': 1e-3, 'after': after}, 'inference': {'before': 1e-3, 'after': 1e-3}}}
        for times, kernel, after in ((10, 3, 3e-3), (10, 5, 0.5e-3), (10, 9, 1.02e-3), (1, 11, 3e-3))]
    rows = [{
        'network': 'net', 'seconds': {'nchw': {'training': seconds, 'inference': seconds}}, 'layers': layers,
        'min_kernel_size': {
            '7': {'replaced': 0, 'skipped': {'kernel': 20}, 'copy': 'before'},
            '5': {'replaced': 10, 'skipped': {}, 'copy': '5'},
            '3': {'replaced': 20, 'skipped': {'a ScriptModule': 1}, 'copy': '3'}}}]
    assert report.networks(rows).splitlines()[2] \
        == '| net | nchw | 0, 10, 20 | 1000.0 | 1.00 | 2.00 | 0.80 | 0.95 | 1000.0 | 1.00 | 2.00 | 0.80 | 0.95 |'
    assert report.verdict(rows).splitlines() == [
        '7: none', '5: none', '3: net (training, nchw) 0.80, net (inference, nchw) 0.80',
        'control: net (training, nchw) 0.95, net (inference, nchw) 0.95']
    assert report.reasons(rows) == 'net: 1 × a ScriptModule'
    line, = report.slower_layers(rows).splitlines()[2:]
    assert line == '| net | nchw | training | 3x3 | 1x1 | 2x8x7x7 | 10 | 1.000 | 3.000 | 3.00 | 2.0 % |'


# --- latency ---


@pytest.fixture
def latency(load, monkeypatch, tmp_path):
    module = load('latency')
    monkeypatch.setattr(module.measure, 'RESULTS', tmp_path)
    monkeypatch.setattr(sys, 'argv', [
        'latency.py', '--model', 'smpconv_nano', '--against', 'convnext_atto', '--img-size', '32', '--rounds', '1'])
    return module


def test_latencies_are_stored_and_compared(latency, tmp_path, capsys):
    assert latency.main() == 0
    row = json.loads((tmp_path / 'latency.jsonl').read_text())
    assert row['batch_size'] == 1 and row['img_size'] == 32
    ours, theirs = row['seconds']['smpconv_nano'], row['seconds']['convnext_atto']
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith('smpconv_nano') and f'{ours / theirs:.3f} x convnext_atto' in line


def test_the_latency_of_a_wrong_network_is_not_measured(latency, tmp_path, monkeypatch):
    monkeypatch.setattr(latency.timm.utils, 'reparameterize_model', lambda model: latency.timm.create_model(
        'smpconv_nano').eval())
    with pytest.raises(SystemExit, match='nothing is timed'):
        latency.main()
    assert not list(tmp_path.iterdir())


# --- on a GPU ---


def test_every_phase_of_the_gpu_command_runs_dry(tmp_path):
    """Run the command from another folder, where the checkout is not installed and other packages are hidden."""
    prediction = tmp_path / 'prediction.jsonl'
    prediction.write_text('{"case": "tiny_2x2", "path": "triton/nchw", "result": "y", "ms": 2}\n\n'
                          '{"network": "smpconv_nano", "compiled": false, "category": "norms", "ms": 0.5}\n'
                          '{"network": "smpconv_nano", "dtype": "float32", "ms": 3.5}\n'
                          '{"form": "block_forward", "dtype": "float16", "ms": 4.5}\n'
                          '{"case": "tiny2x2", "ms": 5.5}\n')
    hidden = ('pytest_timeout', 'scipy', 'sklearn', 'xdist')
    (tmp_path / 'sitecustomize.py').write_text(f'import sys\nsys.modules.update(dict.fromkeys({hidden}))\n')
    environment = {**os.environ, 'PYTHONPATH': str(tmp_path), 'PYTEST_DISABLE_PLUGIN_AUTOLOAD': '1'}
    command = [sys.executable, BENCHMARKS / 'gpu.py', '--dry-run', '--device', 'cpu', '--results', tmp_path,
               '--prediction', prediction]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split() for line in lines[-4:]] == [[phase, 'right'] for phase in ('check', 'layers', 'steps', 'tune')]
    assert [sum(f'predicted {ms} ms' in line for line in lines) for ms in (2, 0.5, 3.5, 4.5, 5.5)] == [1, 1, 1, 1, 0]
    assert lines[-5] == 'no measurement for the prediction {"case": "tiny2x2", "ms": 5.5}'
    checks, layers, steps, tiles = (
        [json.loads(line) for line in (tmp_path / f'{name}.jsonl').read_text().splitlines()]
        for name in ('gpu_check', 'depthwise', 'gpu_steps', 'gpu_tiles'))
    assert all({'date', 'device', 'torch'} <= row.keys() for row in (*checks, *layers, *steps, *tiles))
    assert not any(row['faults'] for row in checks)
    assert {'block_forward', 'block_weight_grad', 'plain/nhwc', 'triton/nhwc'} <= checks[0]['errors'].keys()
    assert checks[-1]['passed'] == 1
    assert layers[0]['ceilings'].keys() == {'bytes_per_second', 'operations_per_second'}
    assert steps[0]['kernel_seconds']['sampling of kernels'] > 0 and steps[1]['compiled']
    assert all(row['tile'] and row['seconds'] > 0 for row in tiles)
    tuning = importlib.import_module('smpconv_models.ops._triton.tuning')
    for entry in json.loads((tmp_path / 'sm_None.json').read_text()):
        assert tuning.TILES[entry['kernel']](**entry['tile'])
    assert (tmp_path / 'gpu_layers.png').read_bytes().startswith(b'\x89PNG')


def test_a_machine_without_a_gpu_is_one_line(load, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    assert load('gpu').main(['--results', str(tmp_path), '--configs', str(tmp_path)]) == 1
    output = capfd.readouterr()
    assert output.out == ''
    assert output.err == (
        f'gpu.py: error: PyTorch {torch.__version__} finds no CUDA device: an NVIDIA GPU and its driver are needed\n')
    assert not list(tmp_path.iterdir())


@pytest.fixture
def gpu(load, monkeypatch):
    """The command, with a clock that the test advances and phases that it replaces."""
    gpu, limits, clock = load('gpu'), load('limits'), [0.]
    monkeypatch.setenv('TRITON_INTERPRET', '1')  # and restore what a dry run sets
    monkeypatch.setattr(limits, 'time', types.SimpleNamespace(monotonic=lambda: clock[0]))

    def with_phases(answer):
        monkeypatch.setattr(gpu.limits, 'call', lambda function, seconds: answer(clock, function, seconds))
        return gpu
    return with_phases


def test_parts_that_are_left_out_are_no_success(gpu, tmp_path, capfd):
    command = gpu(lambda clock, function, seconds: command.limits.Outcome(command.Found([], ['t_56, float16'], set())))
    assert command.main(['--dry-run', '--phase', 'layers', '--results', str(tmp_path)]) == 1
    assert capfd.readouterr().out.splitlines()[-1] == 'layers   left out for lack of time: t_56, float16'


def test_the_minutes_include_the_search_for_a_gpu(gpu, tmp_path, capfd):
    given = []

    def answer(clock, function, seconds):
        given.append(seconds)
        clock[0] += 40
        return command.limits.Outcome(None if len(given) == 1 else command.Found([], [], set()))

    command = gpu(answer)
    folder = str(tmp_path)
    assert command.main(['--phase', 'check', '--minutes', '1', '--results', folder, '--configs', folder]) == 0
    assert given == [60, 20]


def test_a_part_starts_only_if_it_fits_the_time_left(load, monkeypatch):
    limits, clock = load('limits'), [0.]
    monkeypatch.setattr(limits, 'time', types.SimpleNamespace(monotonic=lambda: clock[0]))
    deadline = limits.Deadline(100)
    assert deadline.allows('eager', 100) and not deadline.allows('eager', 101)
    for seconds in (40, 2):
        with deadline.timed('eager'):
            clock[0] += seconds
    with pytest.raises(RuntimeError), deadline.timed('compiled'):
        raise RuntimeError
    assert not deadline.allows('eager', 0)  # 58 left, but 60 needed
    assert deadline.allows('compiled', 58)


def test_without_pytest_no_tests_run(load, monkeypatch, tmp_path, capsys):
    pytest.importorskip('triton', reason='PyTorch brings Triton on Linux only')
    gpu_check = load('gpu_check')
    monkeypatch.setitem(sys.modules, 'pytest', None)
    with gpu_check._tests_beside(types.SimpleNamespace(is_dry=False), tmp_path) as tests:
        assert tests is None
    assert capsys.readouterr().out == 'no tests: pytest is not installed\n'


@pytest.mark.skipif(os.name == 'nt', reason='the program is a script of sh')
@pytest.mark.parametrize(('script', 'clock'), [
    ('echo $1, 2, 3, 4', {'clocks.sm': '--id=GPU-12-34', 'clocks.mem': '2', 'temperature.gpu': '3', 'power.draw': '4'}),
    ('echo no such GPU; exit 6', {}),
    ('exec sleep 60', {}),
])
def test_the_clock_is_that_of_the_measured_gpu(load, monkeypatch, tmp_path, script, clock):
    ceilings = load('ceilings')
    tool, run = tmp_path / 'nvidia-smi', subprocess.run
    tool.write_text(f'#!/bin/sh\n{script}\n')
    tool.chmod(0o700)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: types.SimpleNamespace(uuid='12-34'))
    monkeypatch.setattr(ceilings.subprocess, 'run', lambda *args, **options: run(*args, **{**options, 'timeout': 2}))
    assert ceilings.clock(torch.device('cuda')) == clock


def test_a_program_that_cannot_start_reports_no_clock(load, monkeypatch, tmp_path):
    ceilings = load('ceilings')
    monkeypatch.setattr(ceilings.shutil, 'which', lambda name: str(tmp_path / name))
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: types.SimpleNamespace(uuid='12-34'))
    assert ceilings.clock(torch.device('cuda')) == {}


def small_step(load, monkeypatch, device):
    """Return the row of a training step of two small images."""
    gpu_steps = load('gpu_steps')
    monkeypatch.setattr(gpu_steps.kernel_times, 'measured', lambda *args, **options: {'kernel_seconds': {}})
    settings = types.SimpleNamespace(device=torch.device(device), is_dry=True, deadline=load('limits').Deadline(60))
    return gpu_steps._measure(gpu_steps.Case('smpconv_nano'), settings)


def test_the_peak_is_read_before_the_timing(load, monkeypatch):
    gpu_steps, calls = load('gpu_steps'), []
    monkeypatch.setattr(gpu_steps, '_peak_bytes', lambda device: calls.append('peak') or 7)
    monkeypatch.setattr(gpu_steps.measure, 'interleaved', lambda *args: calls.append('timing') or {'step': 1.})
    assert small_step(load, monkeypatch, 'cpu')['peak_bytes'] == 7
    assert calls == ['peak', 'timing', 'timing']


@pytest.mark.gpu
def test_the_peak_is_without_the_memory_of_the_stopwatch(load, monkeypatch):
    assert 0 < small_step(load, monkeypatch, 'cuda')['peak_bytes'] < 2 ** 28


@pytest.mark.parametrize(('function', 'seconds', 'value', 'fault'), [
    (lambda: 'done', 20, 'done', None),
    (lambda: 1 / 0, 20, None, 'ended with exit code 1'),
    (lambda: os.kill(os.getpid(), signal.SIGKILL), 20, None, 'ended with exit code -9'),
])
def test_a_phase_ends_without_ending_others(load, function, seconds, value, fault):
    assert load('limits').call(function, seconds) == (value, fault)


def test_a_phase_ends_at_its_limit_with_its_children(load):
    """A pipe that the child holds open is closed by its end."""
    receiver, sender = os.pipe()
    outcome = load('limits').call(lambda: subprocess.run(['sleep', '600'], pass_fds=[sender]), 3)
    os.close(sender)
    assert outcome == (None, 'stopped after 3 seconds')
    assert os.read(receiver, 1) == b''
    os.close(receiver)


def test_predictions_are_compared_with_what_they_name(load, tmp_path):
    path = tmp_path / 'prediction.jsonl'
    path.write_text('{"case": "t_56", "ms": 0.1}\n{"case": "t_56", "result": "dw", "ms": 0.2}\n'
                    '{"network": "smpconv_t", "compiled": true, "ms": 30}\n')
    predictions = load('predictions').Predictions.read(path)
    assert predictions.seconds(case='t_56', result='dw', path='auto/nchw') == [1e-4, 2e-4]
    assert predictions.seconds(case='t_28', result='dw') == []
    assert predictions.seconds(network='smpconv_t', compiled=True) == [0.03]
    assert predictions.seconds(network='smpconv_t', compiled=True, category='norms') == []
    line, = predictions.lines(0.045, network='smpconv_t', compiled=True)
    assert line == 'smpconv_t, True: predicted 30 ms, measured 45 ms, 1.50 x'
    assert predictions.compared == {0, 1, 2}
    assert predictions.lines_except({0, 2}) == [
        'no measurement for the prediction {"case": "t_56", "result": "dw", "ms": 0.2}']


@pytest.mark.parametrize(('text', 'message'), [
    ('{"ms": 1}', 'line 1: ms describes nothing'),
    ('\n{"case": "t_56", "ms": 0}', 'line 2: ms must be a finite number above 0, got 0'),
    ('{"case": "t_56", "ms": Infinity}', 'ms must be a finite number above 0, got inf'),
    ('{"case": "t_56", "ms": 1' + 400 * '0' + '}', 'ms must be a finite number above 0, got 1000'),
    ('{"case": 3, "ms": 1}', 'got case=3'),
    ('{"layer": "t_56", "ms": 1}', "got layer='t_56'"),
    ('t_56 1', "expected a JSON object, got 't_56 1'"),
])
def test_an_invalid_prediction_is_one_line(load, tmp_path, capsys, text, message):
    path = tmp_path / 'prediction.jsonl'
    path.write_text(text)
    with pytest.raises(SystemExit) as exit:
        load('gpu').main(['--prediction', str(path)])
    line, = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and line.startswith('gpu.py: error: --prediction: ') and message in line


# --- kernel time by category ---


class Network(nn.Sequential):
    """A network with a layer of each kind."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), smpconv_models.SMPDepthwiseConv2d(8, 9, 4, backend='cpu'),
            nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Flatten(), nn.Linear(8 * 64, 5))


def kernel_rows(load, network):
    kernel_times, training_step = load('kernel_times'), load('training_step')
    images, labels = training_step.random_images(2, torch.device('cpu'), 8)
    step = training_step.make_step(network, images, labels % 5)
    return kernel_times.measured(step, network, torch.device('cpu'), is_compiled=False)


def test_kernel_time_by_category(load, monkeypatch):
    kernel_times = load('kernel_times')
    monkeypatch.setattr(kernel_times, '_LARGEST', 1000)  # all, as their order depends on the machine's load
    network = Network()
    found = kernel_rows(load, network)
    expected = set(kernel_times.CATEGORIES) - {kernel_times.UNKNOWN, kernel_times.DEPTHWISE_COPIES}
    assert expected <= found['kernel_seconds'].keys()
    assert found['kernel_seconds'].keys() == found['launches'].keys()
    assert 'kernel' not in vars(network[1])  # the layer is as before
    names = {row['name']: row['category'] for row in found['kernels']}
    assert names['smpconv_models::depthwise_conv2d'] == kernel_times.DEPTHWISE


@pytest.mark.parametrize(('shape', 'is_depthwise'), [
    ((8, 1, 11, 11), True), ((8, 1, 1, 11), True), ((8, 1, 11, 1), True), ((8, 1, 1, 1), False), ((8, 8, 3, 3), False)])
def test_weights_of_depthwise_convolutions(load, shape, is_depthwise):
    assert load('kernel_times').is_depthwise_kernel(shape) == is_depthwise


def test_the_backward_pass_of_sampling_is_sampling(load):
    """Without trained points, only the forward pass is left."""
    sampling = load('kernel_times').SAMPLING
    network = Network()
    trained = kernel_rows(load, network)['launches'][sampling]
    network[1].requires_grad_(False)
    frozen = kernel_rows(load, network)['launches'][sampling]
    assert trained > 1.5 * frozen > 0


# --- launches without a GPU ---


def planned(load, plan):
    network = Network()
    network[1].backend = 'auto'  # on the GPU there is no other
    return load('launches').plan(network, 2, 8, plan)


def test_launches_and_bytes_of_a_step(load):
    kernel_times, found = load('kernel_times'), planned(load, 'eager')
    counts, moved = found['launches'], found['bytes']
    assert counts.pop('all') == sum(counts.values()) and moved.pop('all') == sum(moved.values())
    assert counts.keys() == moved.keys()
    assert (counts[kernel_times.DEPTHWISE], counts[kernel_times.PLAIN_DEPTHWISE]) == (2, 2)
    assert counts[kernel_times.PRODUCTS] == 2 + 3  # the first convolution gets no gradient of the image
    assert counts[kernel_times.NORMS] == 3  # one of them counts batches
    assert counts[kernel_times.SAMPLING] <= 43
    maps, weight, bias = 2 * 8 * 8 * 8 * 2, 8 * 3 * 3 * 2, 8 * 2
    assert moved[kernel_times.PLAIN_DEPTHWISE] == (2 * maps + weight + bias) + (3 * maps + 2 * weight + bias)


@pytest.mark.slow  # inductor schedules for 10 s
@pytest.mark.parametrize('plan', ['compiled', 'combined'])
def test_launches_of_a_compiled_step(load, plan):
    """The kernels are those for a GPU that need not exist."""
    kernel_times = load('kernel_times')
    eager, fused = (planned(load, name)['launches'] for name in ('eager', plan))
    for category in (kernel_times.DEPTHWISE, kernel_times.PLAIN_DEPTHWISE, kernel_times.PRODUCTS):
        assert fused[category] == eager[category]
    assert fused[kernel_times.SAMPLING] < eager[kernel_times.SAMPLING] / 2


# --- tiles ---


@pytest.fixture
def tiles(load):
    pytest.importorskip('triton', reason='PyTorch brings Triton on Linux only')
    return load('gpu_tiles')


def test_jobs_are_the_kernels_that_the_networks_take(tiles):
    jobs = tiles.jobs(False, torch.device('cpu'))
    assert jobs[0] == ('block_forward', 64, 96, 56, 56, 31) and jobs[7] == ('map_weight_grad', 64, 768, 7, 7, 13)
    assert len({job.key() for job in jobs}) == len(jobs) == 22


def test_jobs_of_one_device_alone(tiles, monkeypatch):
    monkeypatch.setattr(tiles.tuning, '_capability', lambda device: 90)
    found = [(job.form, job.width) for job in tiles.jobs(False, torch.device('cpu')) if job.form.startswith('hopper')]
    assert found[:5] == [
        ('hopper_forward', 56), ('hopper_block_weight_grad', 56), ('hopper_forward', 28),
        ('hopper_block_weight_grad', 28), ('hopper_map_forward', 14)]


def test_neighbors_differ_in_one_field(tiles):
    default = tiles.jobs(False, torch.device('cpu'))[1].default(torch.device('cpu'))
    found = list(tiles.neighbors(default))
    assert len(set(found)) == len(found) > 8
    for tile in found:
        changed = [name for name, value in vars(tile).items() if value != getattr(default, name)]
        assert len(changed) == 1 and tile.r <= tile.d and tile.s <= tile.tc


@pytest.fixture
def search(tiles, monkeypatch, tmp_path):
    """A search whose tiles take given seconds, and of which some are wrong; returns it after a round."""
    def advance(seconds, wrong=()):
        job = tiles.Job('map_forward', 2, 2, 4, 4, 7)
        default = job.default(torch.device('cpu'))
        tile = {'default': default, 'fast': dataclasses.replace(default, bo=64), 'slow': dataclasses.replace(
            default, bo=128)}
        wrong = [tile[name] for name in wrong]
        by_tile = {tile[name]: value for name, value in seconds.items()}
        monkeypatch.setattr(tiles.Job, 'run', lambda self, operands, tile: torch.nn.functional.conv2d(
            *operands[:2], padding=3, groups=2) * (1.1 if tile in wrong else 1))
        monkeypatch.setattr(tiles.measure, 'interleaved', lambda functions, *args: {
            name: by_tile[name] for name in functions})
        settings = types.SimpleNamespace(device=torch.device('cpu'), is_dry=True)
        report = tiles.Report()
        found = tiles.Search.start(job, [], settings.device)
        tiles._advance(found, list(tile.values()), settings, report)
        return found, report.faults, tile
    return advance


def test_the_search_moves_to_the_fastest_right_tile(search):
    found, faults, tile = search({'default': 3., 'fast': 1., 'slow': 4.})
    assert found.best == tile['fast'] and found.frontier and found.is_better() and not faults
    found, faults, tile = search({'default': 3., 'fast': 1., 'slow': 4.}, wrong=['fast'])
    assert found.best == tile['default'] and not found.is_better()
    fault, = faults
    assert 'y of map_forward is wrong: relative error 1.0e-01' in fault


@pytest.mark.parametrize('default', [0.5, 1.02, 3.])
def test_a_right_tile_is_better_than_a_wrong_default(search, default):
    found, faults, tile = search({'default': default, 'fast': 1., 'slow': 4.}, wrong=['default'])
    assert found.best == tile['fast'] and found.frontier and found.is_better() and len(faults) == 1
    assert found.entry()['tile'] == vars(tile['fast']) and 'the default fails' in found.entry()['source']


def test_a_search_without_a_right_tile_is_better_by_none(search):
    found, faults, _ = search({'default': 1., 'fast': 2., 'slow': 3.}, wrong=['default', 'fast', 'slow'])
    assert not found.is_better() and not found.frontier and len(faults) == found.failed == 3


@pytest.fixture
def on_b200(tiles, monkeypatch):
    """Device with the limits of a B200."""
    from smpconv_models.ops._triton.limits import _LIMITS
    monkeypatch.setattr(tiles.tuning, '_limits', lambda device, capability: _LIMITS[100])
    return torch.device('cpu')


def test_only_tiles_that_fit_are_tuned(tiles, on_b200):
    """The package would not launch a tuned tile that does not fit."""
    job = next(job for job in tiles.jobs(False, on_b200) if job.form == 'block_forward' and job.kernel == 51)
    wanted = tiles.tuning.BlockTile.default(64, 56, 56, [51, 51], 'half')
    assert not job.fits(wanted, on_b200)
    found = tiles.Search.start(job, [wanted], on_b200)
    assert found.default == found.best == job.default(on_b200) and found.default in found.frontier
    assert wanted not in found.frontier and all(job.fits(tile, on_b200) for tile in found.frontier)
    others = list(tiles.neighbors(dataclasses.replace(found.default, bp=256)))
    found.look_at(others)
    assert found.frontier and all(job.fits(tile, on_b200) for tile in found.frontier)
    assert not all(job.fits(tile, on_b200) for tile in others)


def test_no_search_starts_without_a_tile_that_fits(tiles, monkeypatch):
    monkeypatch.setattr(tiles.tuning, '_limits', lambda device, capability: tiles.tuning.Limits(0))
    assert tiles.Search.start(tiles.jobs(True, torch.device('cpu'))[0], [], torch.device('cpu')) is None


def test_the_tiles_that_the_package_launches_are_checked(load, tiles, on_b200, monkeypatch):
    gpu_check, checked = load('gpu_check'), {}

    def comparison(job, operands, exact, tile):
        checked[job.form] = tile
        assert job.fits(tile, on_b200)
        return load('check').Comparison(job.form, job.result, 0., 1.)

    monkeypatch.setattr(tiles.Job, 'comparison', comparison)
    monkeypatch.setattr(gpu_check.layer, 'paths', lambda *args: {})
    monkeypatch.setattr(gpu_check.check, 'compare', lambda *args: [])
    monkeypatch.setattr(gpu_check.check, 'Exact', lambda *args: None)
    case = load('cases').Case('mobile51_56', 1, 56, 56, 51, batch=64)
    row = gpu_check._layer_row(case, 'float16', 'ieee', on_b200)
    assert row['errors'].keys() == checked.keys() == {'block_forward', 'block_weight_grad'}


def test_a_search_ends_where_no_neighbor_is_faster(search):
    found, _, tile = search({'default': 1., 'fast': 1.5, 'slow': 2.})
    assert found.best == tile['default'] and not found.frontier and not found.is_better()


def test_tuned_tiles_replace_those_of_the_same_problem(load, tiles, search, tmp_path):
    tile_configs = load('tile_configs')
    found, _, tile = search({'default': 3., 'fast': 1., 'slow': 4.})
    path = tile_configs.path_of(tmp_path, torch.device('cpu'))
    other = dict(kernel='map_forward', mode='half', batch=64, height=4, width=4, kernel_size=[7, 7],
                 tile=vars(tile['slow']), source='another batch')
    same = {**other, 'batch': 2, 'source': 'predicted'}
    path.write_text(json.dumps([same, other]))
    assert tile_configs.tiles(path, found.job.key()) == [tile['slow']]
    tiles.write(path, [found])
    kept, written = json.loads(path.read_text())
    assert kept == other and written['tile'] == vars(tile['fast']) and written['source'].startswith('measured on ')
    assert tile_configs.tiles(path, found.job.key()) == [tile['fast']]
    found.best = tile['default']
    tiles.write(path, [found])
    assert json.loads(path.read_text()) == [other]


def test_failures_of_the_tests_are_read(load, tmp_path):
    pytest.importorskip('triton', reason='PyTorch brings Triton on Linux only')
    (tmp_path / 'test_made.py').write_text(
        'import pytest\ndef test_right():\n    pass\ndef test_wrong():\n    assert 1 == 2\n'
        '@pytest.mark.skip\ndef test_left_out():\n    pass\n')
    (tmp_path / 'test_broken.py').write_text('import no_such_module\n')
    subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '--continue-on-collection-errors', '--junitxml', 'tests.xml'],
        cwd=tmp_path, capture_output=True)
    found = load('gpu_check')._read_results(tmp_path / 'tests.xml')
    assert (found['passed'], found['skipped']) == (1, 1)
    broken, wrong = sorted(found['faults'])
    assert 'test_broken' in broken and 'test_wrong: assert 1 == 2' in wrong
