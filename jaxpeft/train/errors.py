"""What a user can put right, as one line instead of a traceback."""

import contextlib
import sys
from collections.abc import Iterator


class UserError(ValueError):
    """Bad input, a full disk, a loss that is not finite: named, with the way out.

    The message is one line that makes sense without the traceback.
    """


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
