"""Warnings that ExecuTorch 1.4.1 raises about its own code, and that say nothing of a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

MESSAGES: tuple[tuple[type[Warning], str], ...] = (
    (DeprecationWarning, "(read|open)_(text|binary) is deprecated"),  # reads its schemas the old way
    (FutureWarning, "_check_is_size will be removed"),  # in the fake kernel of update_cache
    (FutureWarning, "`isinstance\\(treespec, LeafSpec\\)` is deprecated"),  # its pytree use
    (Warning, "This API is experimental and subject to change"),  # its runtime and its data loaders
    (UserWarning, "Mutation on a buffer in the model is detected"),  # caches are such buffers, meant to begin empty
)


@contextmanager
def silenced() -> Iterator[None]:
    """Ignore these warnings; all others pass."""
    with warnings.catch_warnings():
        for category, message in MESSAGES:
            warnings.filterwarnings("ignore", message, category)
        yield
