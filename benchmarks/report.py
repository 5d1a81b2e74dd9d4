"""Report of benchmarks/results/depthwise.jsonl: times side by side, ratios, sums over networks, and two plots.

A path is an operation and the layout of its input. plain is `F.conv2d`, auto this package's selection, and other names
are its backends; nhwc is channels_last. Results are y, dx, dw, and all three as computed by one training step.
"""
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Sequence, Tuple

import floors
from cases import CASES

RESULTS = ('y', 'dx', 'dw', 'all')
LAYOUTS = ('nchw', 'nhwc')
PICTURES = ('.png', '.svg', '.pdf')
NOISE = 1.05  # ratios up to this are called equal

Row = Dict[str, Any]
Predicted = Callable[[Row, str], List[float]]


# --- numbers of a row ---


def speed_up(row: Row, result: str, layout: str) -> float:
    """Return the speed-up of auto over plain in the same layout."""
    return row['seconds'][f'plain/{layout}'][result] / row['seconds'][f'auto/{layout}'][result]


def worst(row: Row, layout: str) -> Tuple[float, str]:
    """Return the largest ratio of auto to plain in the same layout, and its result."""
    return max((1 / speed_up(row, result, layout), result) for result in RESULTS)


def better_plain(row: Row, result: str) -> float:
    return min(row['seconds'][f'plain/{layout}'][result] for layout in LAYOUTS)


def over_better_plain(row: Row, path: str, result: str) -> float:
    return row['seconds'][path][result] / better_plain(row, result)


def floor_seconds(row: Row, result: str) -> float:
    """Return the minimum of floors.py. Three results need three times as much; a fused pass could need less."""
    if 'layers' in row:
        return sum(layer['times'] * floor_seconds(layer, result) for layer in row['layers'])
    ceilings = floors.Ceilings(**row['ceilings']) if 'ceilings' in row else floors.H200
    floor = floors.seconds(*(row[key] for key in ('batch', 'channels', 'height', 'width', 'kernel')), ceilings)
    return 3 * floor if result == 'all' else floor


def has_floor(row: Row) -> bool:
    return 'cuda' in row and row['dtype'] in ('bfloat16', 'float16')


def sums(rows: Sequence[Row]) -> List[Row]:
    """Return a row with the total seconds for each network and dtype that has rows for all layers."""
    groups = defaultdict(list)
    for row in rows:
        if row['network'] is not None:
            groups[row['network'], row['dtype']].append(row)
    layers = Counter(case.network for case in CASES.values())
    return [_sum(group) for (network, _), group in groups.items() if len(group) == layers[network]]


def _sum(group: List[Row]) -> Row:
    first = group[0]
    seconds = {
        path: {result: sum(row['times'] * row['seconds'][path][result] for row in group) for result in RESULTS}
        for path in first['seconds']
    }
    return {**first, 'case': first['network'], 'seconds': seconds, 'layers': group}


# --- as text ---


def times(rows: Sequence[Row]) -> str:
    """Return four lines for each row: seconds by path, speed-ups, and shares of the minimum."""
    return _table([_headings(rows[0]), *(line for row in rows for line in _lines(row))])


def _headings(row: Row) -> List[str]:
    unit = 'us' if 'cuda' in row else 'ms'
    headings = [f'{row["dtype"]}, {unit}', '', *row['seconds']]
    headings += [f'speed-up {layout}' for layout in LAYOUTS]
    if has_floor(row):
        headings += ['floor' if 'ceilings' in row else 'H200 floor', *(f'its share {layout}' for layout in LAYOUTS)]
    return headings


def _lines(row: Row) -> Iterable[List[str]]:
    scale = 1e6 if 'cuda' in row else 1e3
    for result in RESULTS:
        line = [_label(row) if result == RESULTS[0] else '', result]
        line += [_number(seconds[result] * scale) for seconds in row['seconds'].values()]
        line += [f'{speed_up(row, result, layout):.2f}' for layout in LAYOUTS]
        if has_floor(row):
            floor = floor_seconds(row, result)
            line.append(_number(floor * scale))
            line += [f'{floor / row["seconds"][f"auto/{layout}"][result]:.0%}' for layout in LAYOUTS]
        yield line


def _label(row: Row) -> str:
    if 'layers' in row:
        return f'{row["case"]}, batch {row["batch"]}, sum'
    return f'{row["case"]}: {row["batch"]}x{row["channels"]}x{row["height"]}x{row["width"]} k{row["kernel"]}'


def _number(value: float) -> str:
    return f'{value:.2f}' if value < 100 else f'{value:.0f}'


def verdicts(rows: Sequence[Row]) -> str:
    """Return a line for each row with ratios of times that must not be above 1.

    The ratios are y of auto over the faster of plain's two layouts; auto over plain in the same layout, for the worst
    of y, dx, dw and all; and y, dx, dw and all of the named backends over the faster of plain's two layouts.
    """
    named = [path for path in rows[0]['seconds'] if path.partition('/')[0] not in ('plain', 'auto')]
    headings = [
        f'{rows[0]["dtype"]}, ratios',
        *(f'y/better {layout}' for layout in LAYOUTS),
        *(f'auto/plain, worst {layout}' for layout in LAYOUTS),
        *(f'{path}/better: {", ".join(RESULTS)}' for path in named),
        '',
    ]
    return _table([headings, *(_verdict(row, named) for row in rows)])


def _verdict(row: Row, named: Sequence[str]) -> List[str]:
    worsts = [worst(row, layout) for layout in LAYOUTS]
    return [
        _label(row),
        *(f'{over_better_plain(row, f"auto/{layout}", "y"):.2f}' for layout in LAYOUTS),
        *(f'{ratio:.2f} {result:>3}' for ratio, result in worsts),
        *('  '.join(f'{over_better_plain(row, path, result):.2f}' for result in RESULTS) for path in named),
        'SLOWER' if any(ratio > NOISE for ratio, _ in worsts) else '',
    ]


def _table(lines: Sequence[Sequence[str]]) -> str:
    """Return a table, left-aligned in the first column, with a minimum width that aligns tables of single rows."""
    first, *others = [max(map(len, column)) for column in zip(*lines)]
    first = max(first, 36)
    return '\n'.join(
        '  '.join([line[0].ljust(first), *(text.rjust(width) for text, width in zip(line[1:], others))]).rstrip()
        for line in lines
    )


# --- as plots ---


def picture(rows: Sequence[Row], path: Path) -> None:
    """Plot speed-ups over `F.conv2d` in the same layout: a panel per dtype and layout, a group of bars per row."""
    from matplotlib.figure import Figure
    dtypes = list(dict.fromkeys(row['dtype'] for row in rows))
    most = max(sum(row['dtype'] == dtype for row in rows) for dtype in dtypes)
    figure = Figure(figsize=(12, len(dtypes) * (1.5 + 0.42 * most)), layout='constrained')
    panels = figure.subplots(len(dtypes), len(LAYOUTS), squeeze=False, sharex=True, sharey='row')
    for dtype, pair in zip(dtypes, panels):
        for layout, axes in zip(LAYOUTS, pair):
            _draw(axes, [row for row in rows if row['dtype'] == dtype], layout)
            axes.set_title(f'{dtype}, {"channels_last" if layout == "nhwc" else "NCHW"}', fontsize=10)
    panels[0, 0].legend(fontsize=8)
    figure.suptitle(f'depthwise_conv2d over F.conv2d in the same layout: {rows[0]["device"]}, torch {rows[0]["torch"]}')
    figure.savefig(path, dpi=110)


def _draw(axes: Any, rows: Sequence[Row], layout: str) -> None:
    height = 0.8 / len(RESULTS)
    for i, result in enumerate(RESULTS):
        positions = [y + (i - (len(RESULTS) - 1) / 2) * height for y in range(len(rows))]
        # bars start at 1: faster to the right, slower to the left
        widths = [speed_up(row, result, layout) - 1 for row in rows]
        axes.barh(positions, widths, height, left=1, label=result)
    axes.axvline(1, color='black', linewidth=0.8)
    axes.set_xscale('log')
    axes.xaxis.set_major_formatter('{x:g}x')
    axes.set(xlabel='times as fast', yticks=range(len(rows)), yticklabels=[_label(row) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis='y', labelsize=8)
    axes.grid(axis='x', alpha=0.3)


# Marker and color by path; hollow markers are plain convolutions.
_MARKERS = {
    'plain/nchw': dict(marker='o', color='C1', markerfacecolor='none', label='F.conv2d, NCHW'),
    'plain/nhwc': dict(marker='s', color='C1', markerfacecolor='none', label='F.conv2d, channels_last'),
    'auto/nchw': dict(marker='o', color='C0', label='depthwise_conv2d, NCHW'),
    'auto/nhwc': dict(marker='s', color='C0', label='depthwise_conv2d, channels_last'),
}


def times_picture(rows: Sequence[Row], path: Path, predicted: Predicted = lambda row, result: []) -> None:
    """Plot the times of each path and the minimum: a panel per result, a line per row.

    Args:
        rows: Rows of one device and dtype.
        path: File to write.
        predicted: Function of a row and a result that returns predicted seconds.
    """
    from matplotlib.figure import Figure
    results = RESULTS[:3]
    figure = Figure(figsize=(15, 2 + 0.3 * len(rows)), layout='constrained')
    for axes, result in zip(figure.subplots(1, len(results), sharey=True), results):
        lines = range(len(rows))
        for name, style in _MARKERS.items():
            axes.plot([row['seconds'][name][result] * 1e6 for row in rows], lines, linestyle='none', **style)
        if has_floor(rows[0]):
            axes.plot([floor_seconds(row, result) * 1e6 for row in rows], lines, 'k|', markersize=12, label='floor')
        expected = [(seconds * 1e6, y) for y, row in enumerate(rows) for seconds in predicted(row, result)]
        if expected:
            axes.plot(*zip(*expected), 'x', color='C3', label='predicted')
        axes.set(xscale='log', xlabel='microseconds', title=result, yticks=lines,
                 yticklabels=[_label(row) for row in rows])
        axes.grid(alpha=0.3)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    figure.legend(*axes.get_legend_handles_labels(), loc='outside lower center', ncols=6)
    figure.suptitle(f'{rows[0]["device"]}, {rows[0]["dtype"]}, PyTorch {rows[0]["torch"]}, {rows[0]["date"]}')
    figure.savefig(path, dpi=110)
