"""Which sites a step works on: exact names, and `re:` followed by a regular expression."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from exporter.errors import RecipeError

PREFIX = "re:"


def select(sites: Iterable[str], targets: Sequence[str], ignore: Sequence[str]) -> list[str]:
    """Sites that a target matches and no `ignore` does, in their own order.

    The grammar is llm-compressor's: a name, or `re:` and a pattern that must match from the start of the name.

    Args:
        sites: Names to choose from.
        targets: Selectors of what is chosen.
        ignore: Selectors of what is left out again.

    Raises:
        RecipeError: a selector matches no site, or its pattern is no regular expression.
    """
    names = list(sites)
    chosen = {name for selector in targets for name in _matched(names, selector, "targets")}
    left_out = {name for selector in ignore for name in _matched(names, selector, "ignore")}
    return [name for name in names if name in chosen - left_out]


def _matched(names: list[str], selector: str, field: str) -> list[str]:
    found = [name for name in names if _matches(name, selector, field)]
    if not found:
        near = get_close_matches(selector.removeprefix(PREFIX), names, n=3, cutoff=0.0)
        raise RecipeError(f"{field}: {selector!r} matches no site; nearest: {', '.join(near) or 'there are none'}")
    return found


def _matches(name: str, selector: str, field: str) -> bool:
    if not selector.startswith(PREFIX):
        return name == selector
    try:
        return re.match(selector.removeprefix(PREFIX), name) is not None
    except re.error as error:
        raise RecipeError(f"{field}: {selector!r} is no regular expression: {error}") from None
