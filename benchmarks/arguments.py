"""Arguments of command lines whose errors are one line."""
import argparse
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Parser with errors of one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: error: {message}\n')


def positive(kind: type) -> Any:
    """Return a type of arguments: numbers above 0 of a kind."""
    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float('inf'):
            raise argparse.ArgumentTypeError(f'must be above 0, got {text}')
        return value
    parse.__name__ = kind.__name__  # the name in argparse's message
    return parse
