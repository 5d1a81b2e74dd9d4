"""Predict the kernels' time on an H200 from their sm_90 builds: `python predict.py > predictions.md`.

A launch takes at least the time of each of these:

    memory      bytes of inputs and outputs, each once, at 4.3 TB/s
    products    multiply-adds of the tiles at 2048 a clock and multiprocessor
    issue       instructions, loop by loop, at 4 warps a clock and multiprocessor
    shared      bytes to and from shared memory at 128 a clock and multiprocessor
    L2          bytes that programs load at 5120 a clock

NCHW tensors: channels_last ones are copied first, and so is the result, 10 to 12 microseconds more for each of 25 MB.
Of a loop step's instructions, `copies` are asynchronous (global to shared memory), `loads` the others.
"""
import math
import re
import sys
from pathlib import Path

import ahead_of_time
import pytest
import torch
import triton

from smpconv_models.ops._triton import launch, tuning

sys.path.append(str(Path(__file__).resolve().parents[2] / 'benchmarks'))
import cases
import floors

BATCH = 64
MULTIPROCESSORS, CLOCK = 132, 1.755e9


def ceil(a, b):
    return -(-a // b)


def steps(name, a):
    """Return how often a launch's loop runs, over all programs, and the sizes M, N, K of a step's product."""
    n, h = a['N'], a.get('H')
    if name == 'map_forward':
        pixels = a['HW_A'] * a['A']
        blocks = ceil(pixels, a['BO']) * ceil(n, a['BN']) * a['C']
        return blocks * ceil(pixels, a['BI']), (a['BN'], a['BO'], a['BI'])
    if name == 'map_weight_grad':
        return a['dw_ptr'].shape[0] * ceil(n, a['BN']) * h, (a['BI'], a['BO'], a['BN'])
    w, r, p = a['W_A'] * a['A'], a['R'], a['KH'] // 2
    if name == 'block_forward':
        rows = sum(min(a['KH'] + r - 1, h + p - top) - max(p - top, 0) for top in range(0, h, r))
        blocks = ceil(n * ceil(w, a['S']), a['BP']) * a['C']
        return rows * blocks * a['CHUNKS'], (r * a['S'], a['BP'], a['TC'])
    count = 0
    for group in range(ceil(a['KH'] + r - 1, a['D'])):
        above = group * a['D'] - p
        count += max(min(ceil(h, r), ceil(max(h - above, 0), r)) - ceil(max(-above - a['D'] + 1, 0), r), 0)
    blocks = ceil(n, a['BN']) * ceil(ceil(w, a['S']), a['BJ']) * a['CHUNKS'] * a['C']
    return count * blocks, (a['D'] * a['TC'], r * a['S'], a['BN'] * a['BJ'])


def predict(launched):
    """Return the microseconds by bound, and the build."""
    built = ahead_of_time.build(launched, 90)
    name, a = launched.kernel.fn.__name__, launched.arguments
    tensors = [value for value in a.values() if isinstance(value, torch.Tensor)]
    memory = sum(tensor.numel() * tensor.itemsize for tensor in tensors) / floors.H200.bytes_per_second * 1e6
    if name in ('expand_rows', 'add_parts'):
        return {'memory': memory}, built
    count, (m, n, k) = steps(name, a)
    a_loop = a['UNROLL'] if name == 'block_forward' else 1      # products of one turn of the loop
    warps = launched.options['num_warps']
    instructions = count / a_loop * len(built.loop) + math.prod(launched.grid) * (built.total - len(built.loop))
    operand_bytes = 2 * (m + n) * k
    clocks = {
        'products': count * m * n * k / 2048,
        'issue': instructions * warps / 4,
        # written once; the first operand read once, the second once for every 64 rows
        'shared': count * (operand_bytes + 2 * k * (m + n * max(1, m // 64))) / 128,
    }
    times = {key: value / MULTIPROCESSORS / CLOCK * 1e6 for key, value in clocks.items()}
    return {'memory': memory, **times, 'L2': count * operand_bytes / 5120 / CLOCK * 1e6}, built


def mix(built):
    """Count the instructions of one step by kind."""
    kinds = {'products': ahead_of_time.PRODUCT.pattern, 'copies': r'(@\S+ )?LDGSTS', 'loads': r'(@\S+ )?LDG\b',
             'shared': r'(@\S+ )?(LDS|STS|LDSM|STSM)\b'}
    counted = {
        kind: sum(bool(re.match(pattern, line)) for line in built.loop) for kind, pattern in kinds.items()}
    return ', '.join(f'{count} {kind}' for kind, count in counted.items() if count)


def main():
    patch = pytest.MonkeyPatch()
    patch.setattr(tuning, '_capability', lambda device: 90)
    print(f'# Predicted, not measured: H200, bfloat16, batch {BATCH}\n')
    print(f'Triton {triton.__version__}, made by predict.py, which describes the counts. Microseconds.\n')
    print('| layer | | kernel | memory | products | issue | shared | L2 | bound | of the floor |')
    print('| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |')
    builds = {}
    for network in ('smpconv_t', 'smpconv_b'):
        sums = {'y': 0., 'dw': 0.}
        for case in (case for case in cases.CASES.values() if case.network == network):
            channels, size, kernel = case.channels, case.height, case.kernel
            floor = floors.seconds(BATCH, channels, size, size, kernel) * 1e6
            x = torch.empty(BATCH, channels, size, size, dtype=torch.bfloat16, device='meta')
            weight = torch.empty(channels, 1, kernel, kernel, dtype=torch.bfloat16, device='meta')
            for result, function, args in (
                    ('y', launch.forward, (x, weight, None)), ('dw', launch.weight_grad, (x, x, [kernel, kernel]))):
                total = 0.
                for launched in ahead_of_time.launches(patch, function, *args):
                    found, built = predict(launched)
                    name = launched.kernel.fn.__name__
                    builds[name, size] = built
                    total += max(found.values())
                    cells = [f'{found[key]:.1f}' if key in found else '' for key in (
                        'memory', 'products', 'issue', 'shared', 'L2')]
                    print(f'| {case.name}, k {kernel}, {channels} | {result} | {name} | {" | ".join(cells)} | '
                          f'{max(found, key=found.get)} | |')
                print(f'| | {result} | together {total:.1f} | | | | | | | {total / floor:.1f} x {floor:.1f} |')
                sums[result] += case.times * total
        print(f'| {network}, all layers | | y {sums["y"]:.0f}, dx as y, dw {sums["dw"]:.0f} | | | | | | | |')
    print('\n| kernel | map | registers | shared memory | instructions | in a step | of them |')
    print('| --- | --- | --- | --- | --- | --- | --- |')
    for (name, size), built in builds.items():
        cells = (name, size, built.registers, built.shared, built.total, len(built.loop), mix(built))
        print(f'| {" | ".join(map(str, cells))} |')


if __name__ == '__main__':
    main()
