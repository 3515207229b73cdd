"""The one place that imports coremltools: it takes seconds and prints about libraries that we do not use."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

from exporter.errors import BackendMissingError

for _name in ("coremltools", "torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside libraries that it tries to import
        import coremltools as ct
        from coremltools import proto
        from coremltools.converters.mil.mil import Builder as mb  # noqa: N813 (its own documents call it mb)
        from coremltools.converters.mil.mil import get_new_symbol, types
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
except ModuleNotFoundError as error:
    raise BackendMissingError("target coreml-ios", error.name, "coreml") from None

__all__ = ["DecodeError", "ct", "get_new_symbol", "mb", "proto", "quiet", "types"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars (errors are exceptions), no warning that a temporary folder goes when it is collected."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
