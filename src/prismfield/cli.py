"""What every command does around its own work: one line for a mistake, exit codes, quiet threads."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and leave the process with its exit code.

    `ValueError` and `OSError` are the user's to mend: they print as one line and exit with 1. Ctrl-C exits with 130, a
    closed pipe (`| head`) with 141, as shells report them. Anything else is our mistake and keeps its traceback; with
    `PRISMFIELD_DEBUG=1` so does everything.

    Args:
        main: the command; returns its exit code, None for 0. It must be what first imports torch.
    """
    # Read when torch loads: idle OpenMP threads that spin slow the threads beside them
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails again
        code = 141
    except (ValueError, OSError) as error:
        if os.environ.get("PRISMFIELD_DEBUG", "0") != "0":
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        code = 1
    sys.exit(code or 0)


def one_line(error: Exception) -> str:
    """The message of an exception without line breaks; of the system's errors, the path and the reason."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
