"""Command lines with a YAML file under them."""
import argparse
from collections import Counter
from typing import Any, Dict, List, NoReturn, Optional

import yaml

from smpconv_models import checkpoint
from smpconv_models.utils.errors import suggestion_suffix

from .cli import Keywords


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
    """YAML loader that refuses a key that is given twice, and aliases, whose values may grow without bound."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.composer.ComposerError(None, None, 'aliases are not supported', self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Dict[Any, Any]:
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in counts.items():
            if count > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f'{checkpoint.shown(key)} is given twice', node.start_mark)
        return super().construct_mapping(node, deep)


def _read(path: str) -> Dict[str, Any]:
    try:
        with open(path) as file:
            values = yaml.load(file, _Loader) or {}  # a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f'--config {path} cannot be read: {error}') from error
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError, yaml.YAMLError) as error:
        # PyYAML raises most of these for a value that does not fit its tag
        reason = checkpoint.printable(' '.join(str(error).split()), 300)
        raise ValueError(f'--config {path} is not YAML of options: {reason}') from error
    if not isinstance(values, dict):
        raise ValueError(f'--config {path} must hold keys and values, got {type(values).__name__}')
    return values


def _typed(parser: argparse.ArgumentParser, values: Dict[Any, Any], path: str) -> Dict[str, Any]:
    actions = {action.dest: action for action in parser._actions if action.dest not in ('config', 'help')}
    typed = {}
    for key, value in values.items():
        dest = key.replace('-', '_') if isinstance(key, str) else ''
        if dest not in actions:
            raise ValueError(f'{path}: unknown key {checkpoint.shown(key)}{suggestion_suffix(dest, actions)}')
        try:
            typed[dest] = _convert(actions[dest], value)
            _check_no_remote_source(dest, typed[dest])
        except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
            raise ValueError(f'{path}: {key} does not take {checkpoint.shown(value)}: {error!s:.300}') from error
    return typed


def _check_no_remote_source(dest: str, value: Any) -> None:
    """Raise ValueError for a value that would run a program or reach another machine.

    A file may come from somebody else, so the command line has to name what is fetched or run. The file may turn on
    switches (``pretrained``, ``dataset_download``, ``log_wandb``), which name nothing.
    """
    if dest == 'model_kwargs':
        checkpoint.check_model_kwargs(value)
    text = value if isinstance(value, str) else ''
    if (
            '://' in text or 'pipe:' in text or ('{' in text and ':' in text)  # braces may expand to either
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
    if isinstance(action, Keywords):
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
