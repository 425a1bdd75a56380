"""Errors that a user can correct, as one line instead of a traceback."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any


class UserError(ValueError):
    """An error that a user can correct: bad input, a full disk, a loss that is not finite.

    The message is one line that names the cause and the way out, without the traceback.
    """


def need(module: str, extra: str, purpose: str) -> Any:
    """Imports an optional module. Call it before the work that will use the module.

    Args:
      module: Dotted name of the module.
      extra: The extra of jaxpeft that installs it.
      purpose: What needs it, for the message.

    Raises:
      UserError: It is not installed.
    """
    name = module.split(".")[0]
    try:
        importlib.import_module(name)
        return importlib.import_module(module)
    except ImportError as error:
        # The module may be installed and lack a dependency of its own.
        lacking = "" if error.name in (None, name, module) else f" ({error})"
        raise UserError(
            f"{purpose} needs {name}: pip install 'jaxpeft[{extra}]'{lacking}."
        ) from None


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the process with exit code 2 and one line on stderr if a `UserError` is raised.

    For the `main` of a command. Every other exception is a bug and keeps its traceback.
    """
    try:
        yield
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
