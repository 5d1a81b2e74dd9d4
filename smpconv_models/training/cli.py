"""Command lines that are generated from dataclasses, with a YAML file of defaults under them."""
import argparse
import ast
import logging
import math
import os
from collections import Counter
from dataclasses import field, fields
from pathlib import Path
from typing import Any, Callable, Dict, List, NoReturn, Optional, Sequence, Type, TypeVar

import yaml

from smpconv_models import checkpoint
from smpconv_models.utils.errors import suggestion_suffix

Options = TypeVar('Options')

_MIN_POSITIVE = 1e-30  # stands for an open interval at 0


class Parser(argparse.ArgumentParser):
    """Parser that reports an error as one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f'{self.prog}: error: {message}\n')

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a command line; an unknown option is an error with a suggestion."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition('=')[0]
            hint = renamed_hint(name.lstrip('-')) or suggestion_suffix(
                _ABBREVIATED.get(name.lstrip('-').replace('_', '-'), name), self._option_string_actions)
            self.error(f'unrecognized arguments: {" ".join(unknown)}{hint}')
        folder = parsed.__dict__.pop('folder', None)  # of add_folder
        if folder is not None:
            if parsed.data_dir not in (None, self.get_default('data_dir'), folder):
                self.error(f'--data-dir is given twice: {parsed.data_dir} and {folder}')
            parsed.data_dir = folder
        return parsed


# Names of options in older versions, and in the checkpoints and args.yaml that these wrote.
RENAMED_OPTIONS = {
    'crop_padding': 'random_crop_pad', 'patience_nonfinite': 'max_nonfinite_steps',
    'snapshot_interval': 'save_interval', 'confusion': 'confusion_matrix', 'class_results': 'per_class_results',
}


# Options that timm abbreviates.
_ABBREVIATED = {'learning-rate': '--lr', 'optimizer': '--opt', 'scheduler': '--sched'}


def renamed_hint(name: str) -> str:
    """Return a suffix for an error message with the present name of a renamed option; '' for other names."""
    renamed = RENAMED_OPTIONS.get(name.replace('-', '_'))
    return '' if renamed is None else f'; it is named --{renamed.replace("_", "-")} now'


def option(default: Any, help: str = '', *, flags: Sequence[str] = (), timm: Any = None, **argument: Any) -> Any:
    """Return a dataclass field that :func:`add_options` adds to a command line.

    Args:
        default: Default value. A False default makes a switch.
        help: Help text; the default is appended to it.
        flags: Flags besides ``--name-of-the-field``.
        timm: Default of the option in timm's script, for the help text, if it differs.
        argument: Arguments of ``add_argument``.
    """
    if default is False:
        argument.setdefault('action', 'store_true')
    if default is not None and default is not False and default != {} and '(default' not in help:
        help += ' (default: %(default)s' + (f'; timm: {timm}' if timm is not None else '') + ')'
    metadata = {'flags': tuple(flags), 'argument': {'help': help.lstrip(), **argument}}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class CheckedOptions:
    """Base of dataclasses of options, which have the types and ranges of the command line from Python as well.

    Raises:
        ValueError: If a value is not one that the command line accepts.
    """

    def __post_init__(self) -> None:
        for item in fields(self):  # type: ignore[arg-type]
            argument, value = item.metadata['argument'], getattr(self, item.name)
            convert, choices = argument.get('type'), argument.get('choices')
            for part in value if isinstance(value, (list, tuple)) else [] if value is None else [value]:
                try:
                    is_right = convert is None or convert(str(part)) == part
                except (ValueError, argparse.ArgumentTypeError) as error:
                    raise ValueError(f'{item.name} {error}') from error
                if not is_right or (choices is not None and part not in choices):
                    expected = f'one of {tuple(choices)}' if choices else f'a {convert.__name__}'
                    raise ValueError(f'{item.name} must be {expected}, got {part!r}')


def add_options(parser: argparse.ArgumentParser, *groups: Any) -> None:
    """Add the fields of dataclasses as options, each dataclass as an argument group named by its ``title``."""
    for group in groups:
        target = parser.add_argument_group(group.title)
        for item, default in zip(fields(group), vars(group()).values()):
            flag = f'--{item.name.replace("_", "-")}'
            target.add_argument(*item.metadata['flags'], flag, default=default, **item.metadata['argument'])


def add_folder(parser: argparse.ArgumentParser) -> None:
    """Add the folder of the data set as an argument without a name, as in timm's scripts."""
    parser.add_argument(
        'folder', nargs='?', metavar='DIR', help='folder of the data set, as --data-dir')


def add_use_ema(parser: argparse.ArgumentParser) -> None:
    """Add the choice between the weights and the EMA weights of a checkpoint."""
    parser.add_argument(
        '--use-ema', action=argparse.BooleanOptionalAction,
        help='use the EMA weights, or not (default: the better of both if recorded in the checkpoint, otherwise EMA)')


def read_options(args: argparse.Namespace, group: Type[Options]) -> Options:
    """Return the parsed options of one dataclass."""
    return group(**{item.name: getattr(args, item.name) for item in fields(group)})  # type: ignore[arg-type]


def manual(text: Optional[str], prog: str) -> str:
    """Return the docstring of a script for ``--help``, with the commands of its console script if that is `prog`."""
    script = f'{prog.removeprefix("smpconv-")}.py'  # matches nothing if `prog` is the script itself
    text = (text or '').replace(f'python {script}', prog)  # None under python -OO
    return text.replace(f' 4 {script}', f' 4 --no-python {prog}')  # 4 processes


def set_debug_logging(is_on: bool) -> None:
    """Log the traceback behind each error that is reported in one line, if ``--debug`` asks for it."""
    if is_on:
        logging.getLogger('smpconv_models').setLevel(logging.DEBUG)


# --- types of options ---


def bounded_number(kind: Callable[[str], Any], low: float, high: float = math.inf) -> Callable[[str], Any]:
    """Return a converter for argparse that accepts finite numbers of this kind in [low, high]."""
    least = 'above 0' if low == _MIN_POSITIVE else f'at least {low:g}'
    expected = least if high == math.inf else f'{least} and at most {high:g}'

    def convert(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high or abs(value) == math.inf:
            raise argparse.ArgumentTypeError(f'must be {expected}, got {text}')
        return value

    convert.__name__ = 'whole number' if kind is int else 'number'  # argparse names the type of a malformed value
    return convert


positive_int = bounded_number(int, 1, 10 ** 9)
non_negative_int = bounded_number(int, 0, 10 ** 9)
positive_float = bounded_number(float, _MIN_POSITIVE)
non_negative_float = bounded_number(float, 0)
unit_float = bounded_number(float, 0, 1)
positive_unit_float = bounded_number(float, _MIN_POSITIVE, 1)
moderate_float = bounded_number(float, _MIN_POSITIVE, 1e6)  # optimizers multiply and divide by it, in float32


class ParseKwargs(argparse.Action):
    """Parse ``KEY=VALUE`` pairs as timm's ``ParseKwargs`` does; a malformed pair or open bracket is a usage error."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Optional[str] = None) -> None:
        """Store the pairs as a dictionary."""
        keywords = {}
        for pair in values:
            key, equals, value = pair.partition('=')
            if not equals:
                raise argparse.ArgumentError(self, f'expected KEY=VALUE, got {pair}')
            try:
                keywords[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                if value.startswith(('(', '[', '{')):
                    raise argparse.ArgumentError(self, f'expected a value of Python, got {pair}') from None
                keywords[key] = value
        setattr(namespace, self.dest, keywords)


# --- YAML ---


def parse_args(parser: argparse.ArgumentParser, argv: Optional[List[str]] = None) -> argparse.Namespace:
    """Parse a command line; values on the command line override those of the YAML file that ``--config`` names.

    Args:
        parser: Parser with an option ``--config``, which takes a file or the name of a recipe. Keys of the file are
            option names without the leading dashes.
        argv: Arguments, by default those of the process.

    Raises:
        ValueError: If the file cannot be read, or has an unknown key or a value that its option does not accept.
    """
    first, _ = parser.parse_known_args(argv)
    if first.config is not None:
        parser.set_defaults(**_convert_all(parser, _read_yaml(_find_config(first.config)), first.config))
    return parser.parse_args(argv)


def list_recipes() -> Dict[str, Path]:
    """Return the files of the recipes by name: those inside an installed package, otherwise beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside, beside = package / 'recipes', package.parent / 'recipes'
    return {path.stem: path for path in sorted((inside if inside.is_dir() else beside).glob('*.yaml'))}


def _find_config(name: str) -> str:
    """Return the path of a file, or of the recipe of this name if there is no such file."""
    if os.path.exists(name) and not os.path.isdir(name):
        return name
    recipes = list_recipes()
    if name in recipes:
        return str(recipes[name])
    known = f'known recipes: {", ".join(recipes)}{suggestion_suffix(Path(name).stem, recipes)}'
    raise ValueError(f'--config {name} cannot be read: neither a file nor a recipe has this name; {known}')


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses duplicate keys, and aliases, whose values may grow without bound."""

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


def _read_yaml(path: str) -> Dict[str, Any]:
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


def _convert_all(parser: argparse.ArgumentParser, values: Dict[Any, Any], path: str) -> Dict[str, Any]:
    actions = {
        action.dest: action for action in parser._actions
        if action.option_strings and action.dest not in ('config', 'help')}
    converted = {}
    for key, value in values.items():
        dest = key.replace('-', '_') if isinstance(key, str) else ''
        if dest not in actions:
            known = _ABBREVIATED.get(dest.replace('_', '-'), dest).lstrip('-').replace('-', '_')
            hint = renamed_hint(dest) or suggestion_suffix(known, actions)
            raise ValueError(f'{path}: unknown key {checkpoint.shown(key)}{hint}')
        try:
            converted[dest] = _convert(actions[dest], value)
            _check_no_remote_source(dest, converted[dest])
        except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
            raise ValueError(f'{path}: {key} does not take {checkpoint.shown(value)}: {error!s:.300}') from error
    return converted


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
    """Return the value that the command line would have given."""
    if value is None:
        if action.default is not None:
            raise ValueError('expected a value')
        return None
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise ValueError('expected true or false')
        return value
    if action.nargs == '?' and isinstance(value, bool):  # an option with an optional value
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
    # by way of text, as YAML reads 3e-4 as text and 1 as a whole number
    converted = action.type(str(value)) if callable(action.type) else str(value)
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f'expected one of {list(action.choices)}')
    return converted
