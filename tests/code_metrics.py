"""Measure how easy the package is to read: sizes, repeated lines, helpers, and imports in a circle.

Usage: python tests/code_metrics.py [--list] [--at COMMIT]
"""

import argparse
import ast
import io
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Dict, Iterator, List, Set, Tuple

PACKAGE = 'smpconv_models'
MAX_FUNCTION_LINES = 60
SHARED_LINES = 6

Function = ast.FunctionDef | ast.AsyncFunctionDef


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--list', action='store_true', help='name the places behind each count')
    parser.add_argument('--at', metavar='COMMIT', help='measure a commit instead of the working tree')
    args = parser.parse_args()
    root = Path(__file__).parents[1]
    if args.at is None:
        measures = measure(root)
    else:
        command = ['git', 'archive', args.at, PACKAGE, 'tests']
        archive = io.BytesIO(subprocess.run(command, cwd=root, check=True, capture_output=True).stdout)
        with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=archive) as files:
            files.extractall(folder, filter='data')
            measures = measure(Path(folder))
    for name, (count, places) in measures.items():
        print(f'{count:7,}  {name}')  # noqa: T201
        if args.list:
            for place in places:
                print(f'         {place}')  # noqa: T201


def measure(root: Path) -> Dict[str, Tuple[int, List[str]]]:
    """Return each measure's name with its count and the places that were counted."""
    texts = {path.relative_to(root).as_posix(): path.read_text() for path in sorted((root / PACKAGE).rglob('*.py'))}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    tests = [path.read_text() for path in sorted((root / 'tests').rglob('*.py'))]
    circles = import_circles(trees)
    shared = shared_places(texts)
    return {
        'modules': (len(texts), []),
        'lines of the package': (sum(len(text.splitlines()) for text in texts.values()), []),
        'lines of the tests': (sum(len(text.splitlines()) for text in tests), []),
        'signatures with a Namespace': counted(namespace_signatures(trees)),
        'private functions with one caller': counted(single_caller_functions(trees)),
        f'functions above {MAX_FUNCTION_LINES} lines': counted(long_functions(trees)),
        f'pairs of places that share {SHARED_LINES} or more lines': counted(shared),
        'circles of imports': counted(circles),
    }


def counted(places: List[str]) -> Tuple[int, List[str]]:
    return len(places), places


def functions(trees: Dict[str, ast.Module]) -> Iterator[Tuple[str, Function]]:
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield path, node


def namespace_signatures(trees: Dict[str, ast.Module]) -> List[str]:
    return [
        f'{path}:{node.lineno} {node.name}' for path, node in functions(trees)
        if any('Namespace' in ast.unparse(annotation) for annotation in annotations(node))]


def annotations(node: Function) -> List[ast.expr]:
    arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    return [annotation for annotation in (*(arg.annotation for arg in arguments), node.returns) if annotation]


def single_caller_functions(trees: Dict[str, ast.Module]) -> List[str]:
    """Return the private functions and methods whose name is used at one place of the package."""
    uses = Counter(
        node.id if isinstance(node, ast.Name) else node.attr
        for tree in trees.values() for node in ast.walk(tree) if isinstance(node, (ast.Name, ast.Attribute)))
    return [
        f'{path}:{node.lineno} {node.name}' for path, node in functions(trees)
        if node.name.startswith('_') and not node.name.endswith('__') and uses[node.name] == 1]


def long_functions(trees: Dict[str, ast.Module]) -> List[str]:
    """Return the functions with too many lines, from `def` to the last one; a docstring counts."""
    return [
        f'{path}:{node.lineno} {node.name}, {length} lines' for path, node in functions(trees)
        if (length := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES]


def shared_places(texts: Dict[str, str]) -> List[str]:
    """Return pairs of places with the same lines in a row, without blank lines, comments and imports."""
    places: Dict[Tuple[str, ...], List[Tuple[str, int]]] = defaultdict(list)
    for path, text in texts.items():
        lines = [
            (number, line.strip()) for number, line in enumerate(text.splitlines(), 1)
            if line.strip() and not line.strip().startswith(('#', 'import ', 'from '))]
        for start in range(len(lines) - SHARED_LINES + 1):
            window = lines[start:start + SHARED_LINES]
            places[tuple(line for _, line in window)].append((path, window[0][0]))
    pairs: List[Tuple[str, int, str, int]] = []
    for group in places.values():
        pairs += [(*first, *second) for index, first in enumerate(group) for second in group[index + 1:]]
    found, last = [], {}
    for first, line, second, other in sorted(pairs):
        key = (first, second, line - other)  # a longer stretch is one pair
        if key not in last or line - last[key] > SHARED_LINES:
            found.append(f'{first}:{line} {second}:{other}')
        last[key] = line
    return found


def import_circles(trees: Dict[str, ast.Module]) -> List[str]:
    """Return groups of modules that import each other, also within functions."""
    names = {path.removesuffix('.py').removesuffix('/__init__').replace('/', '.'): path for path in trees}
    edges = {
        name: imported(trees[path], name, path.endswith('__init__.py'), set(names)) for name, path in names.items()}
    reached = {name: reachable(name, edges) for name in edges}
    groups = {frozenset(other for other in reached[name] if name in reached[other]) for name in edges}
    return [', '.join(sorted(group)) for group in groups if group]


def imported(tree: ast.Module, name: str, is_package: bool, names: Set[str]) -> Set[str]:
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = name.split('.')[:len(name.split('.')) - node.level + is_package] if node.level else []
            base = '.'.join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                member = f'{base}.{alias.name}'
                modules.add(member if member in names else base)
    return {module for module in modules if module in names and module != name}


def reachable(name: str, edges: Dict[str, Set[str]]) -> Set[str]:
    found, waiting = set(), [name]
    while waiting:
        for other in edges[waiting.pop()] - found:
            found.add(other)
            waiting.append(other)
    return found


if __name__ == '__main__':
    sys.exit(main())
