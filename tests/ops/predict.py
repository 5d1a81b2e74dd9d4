"""Predict the kernels' time on an H100 and an H200 from their sm_90 builds: `python predict.py > predictions.md`.

A launch takes at least the time of each of these, times the waves over their mean, and `LAUNCH` to start and drain:

    memory      bytes of inputs and outputs, each once, at the rate of a copy
    products    multiply-adds of the tiles at 2048 a clock and multiprocessor
    issue       instructions, loop by loop, at 4 warps a clock and multiprocessor
    shared      bytes to and from shared memory at 128 a clock and multiprocessor
    L2          bytes that programs load beyond the L1 cache, at 5.6 TB/s

If a multiprocessor holds one program alone, what comes before and after its loop is added: the time of its
instructions, and `LATENCY` until the first operands have arrived. Several programs hide these from each other.

The waves are those of the programs in the order of their launch, each on the first free place. A multiprocessor has
places for as many programs as its registers, shared memory and threads hold.

Not counted: other latencies, conflicts of shared memory's banks, and sectors that are written in parts. Programs of
hopper_map_weight_grad, hopper_small_map_weight_grad and hopper_map_forward copy, multiply and add one after the other:
where a multiprocessor holds two of them, they may take half as much again. Nor is counted that the programs of a last
wave, which have fewer neighbours, may run faster.
The goal for y of smpconv_t's 7x7 maps on an H200 is less than the time to move its bytes and to launch a kernel.
NCHW tensors: channels_last ones are copied first, and so is the result, 10 to 12 microseconds more for each of 25 MB.
Of a loop step's instructions, `copies` are asynchronous (global to shared memory), `loads` the others.
"""
import heapq
import math
import re
import sys
from dataclasses import dataclass
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
MULTIPROCESSORS, CLOCK, L2 = 132, 1.755e9, 5.6e12
LAUNCH, LATENCY = 1.5, 1.   # microseconds, assumed
GOALS = {'y': 1.6, 'dw': 2.}     # times of the floor
REGISTERS, SHARED, THREADS = 65536, 233472, 2048        # of a multiprocessor
# Copies of the H100 are assumed to take 3.0 TB/s; its products are those of the H200.
DEVICES = {'H200': floors.H200, 'H100': floors.Ceilings(3e12, floors.H200.operations_per_second)}
ADDING = ('expand_rows', 'expand_fragments', 'add_parts', 'add_splits')       # without products


def ceil(a, b):
    return -(-a // b)


@dataclass
class Work:
    """Counts of a launch, over all programs.

    Attributes:
        turns: Runs of the innermost loop with products.
        products: Multiply-adds.
        shared: Bytes to and from shared memory.
        loaded: Bytes from the L2 cache.
        programs: Relative durations in the order of the launch.
        fills: Runs of the loop that copies only, before the first product.
    """
    turns: float
    products: float
    shared: float
    loaded: float
    programs: list
    fills: float = 0.

    @classmethod
    def of_steps(cls, count, m, n, k, programs, unrolled=1):
        """Return the work of ``count`` products of M x K by K x N, with both operands loaded for each."""
        # written once; the first operand read once, the second once for every 64 rows
        shared = 2 * (m + n) * k + 2 * k * (m + n * max(1, m // 64))
        return cls(count / unrolled, count * m * n * k, count * shared, count * 2 * (m + n) * k, programs)


def rows(a, h):
    """Return the input rows of the blocks of 8 or R output rows, from above to below."""
    r, p = a.get('R', 8), a['KH'] // 2
    return [min(a['KH'] + r - 1, h + p - top) - max(p - top, 0) for top in range(0, h, r)]


def work(name, a, grid):
    n, h, programs = a['N'], a.get('H'), math.prod(grid)
    if name == 'map_forward':
        pixels = a['HW_A'] * a['A']
        return Work.of_steps(programs * ceil(pixels, a['BI']), a['BN'], a['BO'], a['BI'], [1] * programs)
    if name == 'map_weight_grad':
        blocks = programs * ceil(n, a['BN'])
        found = Work.of_steps(blocks * h, a['BI'], a['BO'], a['BN'], [1] * programs)
        found.loaded = blocks * 2 * a['BN'] * (a['BI'] + h * a['BO'])      # x is in the L1 cache after the first row
        return found
    if name == 'hopper_small_map_weight_grad':
        blocks, pixels = programs * ceil(n, a['BN']), a['HEIGHT'] * a['WIDTH']
        # both operands written and read, once for every 64 rows; the sums are gathered once
        shared = blocks * 2 * 2 * 2 * 64 * a['BN'] + programs * 2 * 4 * 64 * 64
        return Work(blocks, blocks * 64 * 64 * a['BN'], shared, blocks * 2 * 2 * pixels * a['BN'], [1] * programs)
    if name == 'hopper_map_forward':
        row, strips = 2 * 16 * a['BN'], tuning.strips(a['HEIGHT'], a['WIDTH'])
        # strips written, read by every 4 warps' products, and the result turned; w is in the L1 cache after a strip
        shared = row * (strips + strips * a['R'] // 4 + 2 * a['R'])
        loaded = 2 * a['BN'] * a['HEIGHT'] * a['WIDTH'] + 2 * a['KH'] * a['KW']
        return Work(0, programs * strips * 16 * a['R'] * a['BN'] * 16, programs * shared, programs * loaded,
                    [1] * programs)
    if name == 'hopper_map_weight_grad':
        h, blocks = a['HEIGHT'], programs * ceil(n, a['BN'])
        row = 2 * 16 * a['BN']
        gathered = programs * 2 * 4 * (h + 3) * 64 * 16
        # rows of x and g written; x read once, g for every four rows of x
        return Work(blocks, blocks * 4 * h * 64 * 16 * a['BN'], blocks * row * (16 + h + 16 + 4 * h) + gathered,
                    blocks * row * 2 * h, [1] * programs)
    w = a['W_A'] * a['A']
    if name == 'hopper_forward':
        counts = sorted(rows(a, h), reverse=True)
        each = programs // len(counts)
        turns, row, products = sum(counts) * each, 2 * 16 * a['BN'], 3 * a['J'] - 2
        # a row written once, and a block read by every product of either half of the output rows
        return Work(turns, turns * products * 128 * a['BN'] * 16, turns * row * (a['J'] + 2 * products),
                    turns * (2 * a['BN'] * w + 2 * 3 * 256), [count for count in counts for _ in range(each)])
    if name == 'hopper_block_weight_grad':
        turns, row, products = programs * (h + 3), 2 * 16 * a['BN'], 2 * (3 * a['J'] - 2)
        # four rows of each map written, and four of each read by every product; a row is loaded for four of them
        return Work(turns, turns * products * 64 * 64 * a['BN'], turns * row * (8 * a['J'] + 8 * products),
                    programs * 8 * h * 2 * a['BN'] * w, [1] * programs, programs * (16 + a['AHEAD']))
    if name == 'block_forward':
        counts = [count for count in rows(a, h) for _ in range(ceil(n * ceil(w, a['S']), a['BP']))] * a['C']
        return Work.of_steps(sum(counts) * a['CHUNKS'], a['R'] * a['S'], a['BP'], a['TC'], counts, a['UNROLL'])
    assert name == 'block_weight_grad', name
    r, p = a['R'], a['KH'] // 2
    counts = []
    for group in range(ceil(a['KH'] + r - 1, a['D'])):
        above = group * a['D'] - p
        count = max(min(ceil(h, r), ceil(max(h - above, 0), r)) - ceil(max(-above - a['D'] + 1, 0), r), 0)
        counts += [count * ceil(n, a['BN']) * ceil(ceil(w, a['S']), a['BJ'])] * a['CHUNKS']
    counts = [count / a['splits'] for count in counts] * (a['C'] * a['splits'])
    return Work.of_steps(sum(counts), a['D'] * a['TC'], r * a['S'], a['BN'] * a['BJ'], counts)


def waves(programs, places):
    """Return the time until the last program ends, over that of an even distribution."""
    free = [0.] * places
    for duration in programs:
        heapq.heapreplace(free, free[0] + duration)
    return max(free) / (sum(programs) / places)


def predict(launched, built, ceilings):
    """Return the microseconds by bound, and those of one program alone; without the start of the launch."""
    name, a = launched.kernel.fn.__name__, launched.arguments
    tensors = [value for value in a.values() if isinstance(value, torch.Tensor)]
    memory = sum(tensor.numel() * tensor.itemsize for tensor in tensors) / ceilings.bytes_per_second * 1e6
    if name in ADDING:
        return {'memory': memory}, 0.
    done, warps, programs = work(name, a, launched.grid), launched.options['num_warps'], math.prod(launched.grid)
    held = min(REGISTERS // (built.registers * 32 * warps), SHARED // (built.shared + 1024), THREADS // (32 * warps))
    outside = programs * (built.total - len(built.loop))
    filling = done.fills * len(built.copying)
    instructions = done.turns * len(built.loop) + (outside + filling if held > 1 else 0)
    clocks = {'products': done.products / 2048, 'issue': instructions * warps / 4, 'shared': done.shared / 128}
    times = {key: value / MULTIPROCESSORS / CLOCK * 1e6 for key, value in clocks.items()}
    tail = waves(done.programs, MULTIPROCESSORS * held)
    times = {'memory': memory, **times, 'L2': done.loaded / L2 * 1e6}
    alone = ((outside + filling) * warps / 4 / CLOCK * 1e6 + programs * LATENCY) / MULTIPROCESSORS if held == 1 else 0.
    return {key: value * tail for key, value in times.items()}, alone


def mix(built):
    """Count the instructions of one step by kind."""
    kinds = {'products': ahead_of_time.PRODUCT.pattern, 'copies': r'(@\S+ )?LDGSTS', 'loads': r'(@\S+ )?LDG\b',
             'shared': r'(@\S+ )?(LDS|STS|LDSM|STSM)\b'}
    counted = {
        kind: sum(bool(re.match(pattern, line)) for line in built.loop) for kind, pattern in kinds.items()}
    return ', '.join(f'{count} {kind}' for kind, count in counted.items() if count)


def forms(patch, result, channels, size, kernel):
    """Return the launches of the selected form for sm_90, and before them those of the form for all devices."""
    x = torch.empty(BATCH, channels, size, size, dtype=torch.bfloat16, device='meta')
    weight = torch.empty(channels, 1, kernel, kernel, dtype=torch.bfloat16, device='meta')
    args = (x, weight, None) if result == 'y' else (x, x, [kernel, kernel])
    found = tuning.candidates('forward' if result == 'y' else 'weight_grad', x, [kernel, kernel], 'half')
    first, general = found[0], next(each for each in found if each[0] not in launch._EXPERIMENTAL)
    return [
        ahead_of_time.launches(patch, launch._FORMS[form], *args, tiles[0])
        for form, tiles in dict.fromkeys([general, first])]


def main():
    patch = pytest.MonkeyPatch()
    patch.setattr(tuning, '_capability', lambda device: 90)
    print(f'# Predicted, not measured: H200 and H100, bfloat16, batch {BATCH}\n')
    print(f'Triton {triton.__version__}, made by predict.py, which describes the counts. Microseconds.\n')
    print(f'`before` is the form for all devices, `after` the one that is selected, with {LAUNCH} for each launch.\n')
    print(f'The goals are {GOALS["y"]} times the floor for y and {GOALS["dw"]} times for dw. dx is as y.\n')
    print('| layer | | before | after | floor | before | after | goal |')
    print('| --- | --- | --- | --- | --- | --- | --- | --- |')
    details, builds = [], {}
    for device, ceilings in DEVICES.items():
        for network in ('smpconv_t', 'smpconv_b'):
            sums = {}
            for case in (case for case in cases.CASES.values() if case.network == network):
                channels, size, kernel = case.channels, case.height, case.kernel
                floor = floors.seconds(BATCH, channels, size, size, kernel, ceilings) * 1e6
                for result in ('y', 'dw'):
                    totals = []
                    for launches in forms(patch, result, channels, size, kernel):
                        totals.append(0.)
                        for launched in launches:
                            name = launched.kernel.fn.__name__
                            key = name, size
                            builds[key] = builds.get(key) or ahead_of_time.build(launched, 90)
                            found, alone = predict(launched, builds[key], ceilings)
                            totals[-1] += max(found.values()) + alone + LAUNCH
                            cells = [f'{found[key]:.1f}' if key in found else '' for key in (
                                'memory', 'products', 'issue', 'shared', 'L2')]
                            if device == 'H200':
                                details.append(f'| {case.name} | {result} | {name} | {" | ".join(cells)} | '
                                               f'{max(found, key=found.get)} | {f"{alone:.1f}" if alone else ""} |')
                    before, after = totals[0], totals[-1]
                    sums[result] = [old + case.times * new for old, new in zip(
                        sums.get(result, (0, 0)), (before, after))]
                    print(f'| {device}, {case.name}, k {kernel}, {channels} | {result} | {before:.1f} | {after:.1f} | '
                          f'{floor:.1f} | {before / floor:.1f} x | {after / floor:.1f} x | '
                          f'{"met" if after <= GOALS[result] * floor else "missed"} |')
            for result, (before, after) in sums.items():
                print(f'| {device}, {network}, all layers | {result} | {before:.0f} | {after:.0f} | | | | |')
    print('\nBounds on the H200, with the waves:\n')
    print('| layer | | kernel | memory | products | issue | shared | L2 | bound | alone |')
    print('| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |')
    print('\n'.join(details))
    print('\n| kernel | map | registers | shared memory | instructions | in a step | of them |')
    print('| --- | --- | --- | --- | --- | --- | --- |')
    for (name, size), built in builds.items():
        cells = (name, size, built.registers, built.shared, built.total, len(built.loop), mix(built))
        print(f'| {" | ".join(map(str, cells))} |')


if __name__ == '__main__':
    main()
