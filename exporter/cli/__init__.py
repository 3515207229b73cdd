"""The command `pocket`: words to pipeline calls, results to people or machines, errors to exit codes.

Exit codes: 0 ok, 2 user error, 3 a check failed, 4 a back end is missing, 130 interrupted.
"""

from __future__ import annotations

import sys

import click

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
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())  # noqa: T201 (help was asked for)
        code = 0
    except click.ClickException as error:
        print_error(error.format_message(), 2, wants_json)
        code = 2
    except (KeyboardInterrupt, click.Abort):
        print_error("interrupted; the same command goes on from the last finished stage", 130, wants_json)
        code = 130
    sys.exit(code)
