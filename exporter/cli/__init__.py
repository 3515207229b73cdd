"""The command `pocket`: words to pipeline calls, results to people or machines, errors to exit codes.

Exit codes: 0 ok, 2 user error, 3 a check failed, 4 a back end is missing, 130 interrupted, 1 nobody reads the output.
"""

from __future__ import annotations

import io
import os
import sys

import typer

from exporter.cli.app import app
from exporter.cli.screen import print_error
from exporter.errors import PocketError

INTERRUPTED = 130


def main() -> None:
    """Run the command line, and turn every expected error into one line and its exit code."""
    wants_json = "--json" in sys.argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a model may say what the terminal cannot show
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # typer has caught it
            raise KeyboardInterrupt
    except PocketError as error:
        print_error(str(error), error.exit_code, wants_json)
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        resumes = {"export", "compress"} & set(sys.argv[1:2])
        more = "; the same command goes on from the last finished stage" if resumes else ""
        print_error(f"interrupted{more}", INTERRUPTED, wants_json)
        code = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left over goes nowhere
        code = 1  # as typer does
    except OSError as error:
        print_error(f"{error.filename or 'the system'}: {error.strerror or error}", 2, wants_json)
        code = 2
    except Exception as error:
        explain = getattr(error, "format_message", None)  # typer's usage errors have no public class
        if explain is None:
            raise
        print_error(f"{explain()} See `pocket --help`.", 2, wants_json)
        code = 2
    sys.exit(code)
