"""Report of acceleration.jsonl: networks, skipped layers, and layers that become slower."""
from typing import Any, Dict, List, Tuple

MIN_KERNEL_SIZES = (7, 5, 3)
BEFORE, AFTER, CONTROL = 'before', 'after', 'control'
MODES = ('training', 'inference')
LOSS = 1.03  # ratios of times up to this are called equal
LEAST_SHARE = 0.005  # of a network's time; layers that cost less are not listed

Row = Dict[str, Any]


def speed_up(row: Row, layout: str, mode: str, size: str) -> float:
    """Return how many times as fast a network is with a ``min_kernel_size``, or the control."""
    seconds = row['seconds'][layout][mode]
    return seconds[BEFORE] / seconds[size if size == CONTROL else row['min_kernel_size'][size]['copy']]


def text(rows: List[Row]) -> str:
    """Return all tables."""
    return '\n\n'.join([
        networks(rows), f'slower by more than {LOSS - 1:.0%}, by min_kernel_size:\n{verdict(rows)}',
        f'skipped layers:\n{reasons(rows)}', f'slower layers:\n{slower_layers(rows)}'])


def networks(rows: List[Row]) -> str:
    """Return the table of the networks' times and speed-ups."""
    columns = [str(size) for size in MIN_KERNEL_SIZES]
    headings = ['network', 'layout', f'replaced of {", ".join(columns)} and larger']
    for mode in MODES:
        headings += [f'{mode}, ms', *(f'× from {size}' for size in columns), '× of the control']
    lines = [_line(headings), _line(['---'] * len(headings))]
    for row in rows:
        for layout, modes in row['seconds'].items():
            replaced = [str(row['min_kernel_size'][size]['replaced']) for size in columns]
            cells = [row['network'], layout, ', '.join(replaced)]
            for mode in MODES:
                cells.append(f'{modes[mode][BEFORE] * 1e3:.1f}')
                cells += [f'{speed_up(row, layout, mode, size):.2f}' for size in (*columns, CONTROL)]
            lines.append(_line(cells))
    return '\n'.join(lines)


def verdict(rows: List[Row]) -> str:
    """Return a line for each size, and for the control, with the networks that are slower."""
    lines = []
    for size in (*map(str, MIN_KERNEL_SIZES), CONTROL):
        slower = [
            f'{row["network"]} ({mode}, {layout}) {speed_up(row, layout, mode, size):.2f}'
            for row in rows for layout, modes in row['seconds'].items() for mode in modes
            if speed_up(row, layout, mode, size) * LOSS < 1]
        lines.append(f'{size}: {", ".join(slower) or "none"}')
    return '\n'.join(lines)


def reasons(rows: List[Row]) -> str:
    """Return a line for each network with layers that are skipped at every size."""
    lines = []
    for row in rows:
        skipped = row['min_kernel_size'][str(min(MIN_KERNEL_SIZES))]['skipped']
        if skipped:
            lines.append(f'{row["network"]}: ' + '; '.join(f'{count} × {reason}' for reason, count in skipped.items()))
    return '\n'.join(lines)


def slower_layers(rows: List[Row]) -> str:
    """Return a table of the layers that are slower after the replacement, those that cost the most first."""
    found = []
    for row in rows:
        for layer in row['layers']:
            for mode, seconds in layer['seconds'].items():
                lost = layer['times'] * (seconds[AFTER] - seconds[BEFORE])
                share = lost / row['seconds'][layer['layout']][mode][BEFORE]
                if seconds[AFTER] > LOSS * seconds[BEFORE] and share >= LEAST_SHARE:
                    found.append((share, row['network'], mode, layer))
    headings = [
        'network', 'layout', 'mode', 'kernel', 'stride', 'input', 'times', 'ms before', 'ms after', 'ratio',
        'of the network']
    lines = [_line(headings), _line(['---'] * len(headings))]
    for share, name, mode, layer in sorted(found, key=lambda entry: -entry[0]):
        before, after = (layer['seconds'][mode][key] for key in (BEFORE, AFTER))
        lines.append(_line([
            name, layer['layout'], mode, _times(layer['kernel']), _times(layer['stride']), _times(layer['shape']),
            str(layer['times']), f'{before * 1e3:.3f}', f'{after * 1e3:.3f}', f'{after / before:.2f}',
            f'{100 * share:.1f} %']))
    return '\n'.join(lines)


def _times(sizes: Tuple[int, ...]) -> str:
    return 'x'.join(map(str, sizes))


def _line(cells: List[str]) -> str:
    return f'| {" | ".join(cells)} |'
