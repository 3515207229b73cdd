"""The command `pocket`: words to pipeline calls, results to people or machines, errors to exit codes.

Exit codes: 0 ok, 2 user error, 3 a check failed, 4 a back end is missing, 130 interrupted.
"""

from __future__ import annotations

import sys

import typer

from exporter.cli.app import app
from exporter.cli.screen import print_error
from exporter.errors import PocketError


def main() -> None:
    """Run the command line, and turn every expected error into one line and its exit code."""
    wants_json = "--json" in sys.argv
    try:
        code = app(standalone_mode=False)
    except PocketError as error:
        print_error(str(error), error.exit_code, wants_json)
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print_error("interrupted; the same command goes on from the last finished stage", 130, wants_json)
        code = 130
    except Exception as error:
        explain = getattr(error, "format_message", None)  # typer's usage errors have no public class
        if explain is None:
            raise
        print_error(f"{explain()} See `pocket --help`.", 2, wants_json)
        code = 2
    sys.exit(code)
