"""What ExecuTorch 1.4.1 says about its own code and this machine's processor, and that says nothing of a model."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

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


@contextmanager
def muted() -> Iterator[None]:
    """Keep what is written to stderr, by C++ too, from people, unless an error follows that it may explain.

    Imports and starting the runtime write a dozen lines: libraries for other hardware that cannot be loaded, files
    of phones that a computer does not have.
    """
    with tempfile.TemporaryFile() as said:
        visible = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            yield
        except BaseException:
            said.seek(0)
            with suppress(OSError):  # the error itself is what matters
                os.write(visible, said.read())
            raise
        finally:
            os.dup2(visible, 2)
            os.close(visible)
