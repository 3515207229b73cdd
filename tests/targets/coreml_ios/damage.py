"""Ways to make a package wrong: its operations changed, or bytes of a part of a constant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from targets.coreml_ios.reader import RECORD, ROOT, SPECIFICATION, WEIGHTS, block_of, proto


def edit(package: Path, how: Callable[[Any], None]) -> None:
    """Change the operations of a package."""
    specification = opened(package)
    how(block_of(specification).operations)
    (package / ROOT / SPECIFICATION).write_bytes(specification.SerializeToString(deterministic=True))


def damage(package: Path, site: str, parameter: str, how: Callable[[bytearray], None]) -> None:
    """Change the bytes of a part of a constant in weight.bin."""
    operation = maker(block_of(opened(package)).operations, site.replace(".", "_"))
    offset = operation.inputs[parameter].arguments[0].value.blobFileValue.offset
    content = bytearray((package / ROOT / WEIGHTS).read_bytes())
    _, _, size, start, _ = RECORD.unpack(content[offset : offset + RECORD.size])
    part = content[start : start + size]
    how(part)
    (package / ROOT / WEIGHTS).write_bytes(content[:start] + part + content[start + size :])


def maker(operations: Any, output: str) -> Any:
    """The operation that makes a value."""
    return next(operation for operation in operations if output in [made.name for made in operation.outputs])


def opened(package: Path) -> Any:
    return proto.Model_pb2.Model.FromString((package / ROOT / SPECIFICATION).read_bytes())


def last_bit(part: bytearray) -> None:
    part[10] ^= 1


def another_place(part: bytearray) -> None:
    at = next(at for at, byte in enumerate(part) if byte & 3 in (1, 2))
    part[at] ^= 3


def one_more(part: bytearray) -> None:
    at = next(at for at, byte in enumerate(part) if byte & 1 == 0)
    part[at] ^= 1
