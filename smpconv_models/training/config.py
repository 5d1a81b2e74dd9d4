"""Command lines with a YAML file under them."""
import argparse
import re
from typing import Any, Dict, List, NoReturn, Optional

import yaml
from timm.utils import ParseKwargs

from smpconv_models.hints import did_you_mean


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: error: {message}\n')


def parse_args(parser: argparse.ArgumentParser, argv: Optional[List[str]] = None) -> argparse.Namespace:
    """Parses a command line whose ``--config`` names a YAML file of defaults; what the line says goes first.

    The parser must have an option ``--config``. Keys of the file are the options' names without dashes in front.

    Raises:
        ValueError: The file can't be read, or has an unknown key or a value that its option doesn't take.
    """
    first, _ = parser.parse_known_args(argv)
    if first.config is not None:
        parser.set_defaults(**_typed(parser, _read(first.config), first.config))
    return parser.parse_args(argv)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML's takes the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f'{key!r} is given twice', node.start_mark)
        return super().construct_mapping(node, deep)


def _read(path: str) -> Dict[str, Any]:
    try:
        with open(path) as file:
            values = yaml.load(file, _Loader) or {}  # a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f'--config {path} cannot be read: {error}') from error
    except yaml.YAMLError as error:
        raise ValueError(f'--config {path} is not YAML: {" ".join(str(error).split())}') from error
    if not isinstance(values, dict):
        raise ValueError(f'--config {path} must hold keys and values, got {type(values).__name__}')
    return values


def _typed(parser: argparse.ArgumentParser, values: Dict[Any, Any], path: str) -> Dict[str, Any]:
    actions = {action.dest: action for action in parser._actions if action.dest not in ('config', 'help')}
    typed = {}
    for key, value in values.items():
        dest = str(key).replace('-', '_')
        if dest not in actions:
            raise ValueError(f'{path}: unknown key {key!r:.200}{did_you_mean(dest, actions)}')
        try:
            typed[dest] = _convert(actions[dest], value)
            _check_stays_here(dest, typed[dest])
        except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
            raise ValueError(f'{path}: {key} does not take {value!r:.200}: {error!s:.300}') from error
    return typed


def _check_stays_here(dest: str, value: Any) -> None:
    """Raise ValueError for a value that would run a program or reach another machine.

    A file may come from somebody else: what is fetched or run has to stand on the command line.
    """
    text = value if isinstance(value, str) else ''
    if (
            re.search(r'\bpipe:', text)
            or (dest == 'data_dir' and '://' in text)
            or (dest == 'model' and text.startswith('hf-hub:'))
            or (dest == 'dataset' and text.lower().startswith(('hfds/', 'hfids/', 'tfds/')))):
        raise ValueError(f'expected --{dest.replace("_", "-")} on the command line for what is fetched or run')


def _convert(action: argparse.Action, value: Any) -> Any:
    """The value as the command line would have given it."""
    if value is None:
        if action.default is not None:
            raise ValueError('expected a value')
        return None
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise ValueError('expected true or false')
        return value
    if action.nargs == '?' and isinstance(value, bool):  # an option whose value may be left out
        return action.const if value else None
    if isinstance(action, ParseKwargs):
        if not isinstance(value, dict):
            raise ValueError('expected keys and values')
        return value
    if action.nargs is not None and action.nargs != '?':
        if not isinstance(value, list):
            raise ValueError('expected a list')
        if isinstance(action.nargs, int) and len(value) != action.nargs:
            raise ValueError(f'expected {action.nargs} values')
        return [_convert_one(action, item) for item in value]
    return _convert_one(action, value)


def _convert_one(action: argparse.Action, value: Any) -> Any:
    if isinstance(value, (bool, list, dict)):
        raise ValueError('expected a single value')
    # through text, as YAML takes 3e-4 for text and 1 for a whole number
    converted = action.type(str(value)) if callable(action.type) else str(value)
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f'expected one of {list(action.choices)}')
    return converted
