"""What a user can put right, as one line instead of a traceback."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any


class UserError(ValueError):
    """Bad input, a full disk, a loss that is not finite: named, with the way out.

    The message is one line that makes sense without the traceback.
    """


def need(module: str, extra: str, purpose: str) -> Any:
    """The optional module, imported; called before the work that will use it.

    Args:
      module: Its dotted name.
      extra: The extra of jaxpeft that installs it.
      purpose: What needs it, for the message.
    Raises:
      UserError: where it is not installed.
    """
    name = module.split(".")[0]
    try:
        importlib.import_module(name)
        return importlib.import_module(module)
    except ImportError as error:
        # It may be there and lack something itself.
        lacking = "" if error.name in (None, name, module) else f" ({error})"
        raise UserError(
            f"{purpose} needs {name}: pip install 'jaxpeft[{extra}]'{lacking}."
        ) from None


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the process with exit code 2 and one line on stderr where a `UserError` is raised.

    For the `main` of a command. Every other exception is a defect and keeps its traceback.
    """
    try:
        yield
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
