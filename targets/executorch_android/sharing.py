"""One matrix, once in the file: what a delegate reads is the program's own constant where the bytes are the same.

A .pte is a program and segments; the program says where each segment lies. ExecuTorch writes the constants of the
program into one segment and each blob of a delegate into another, even where a blob is one of the constants (a tied
embedding). Nothing in the format asks segments to lie apart: here the blob's entry is pointed into the segment of the
constants, and its copy is left out. The runtime loads segments by offset and size, so it sees no difference.
"""

from __future__ import annotations

from executorch.exir._serialize._program import (
    _ExtendedHeader,
    _flatbuffer_to_program,
    _get_extended_header,
    _insert_flatbuffer_header,
    _program_to_flatbuffer,
)
from executorch.exir.schema import DataSegment, Program

SEGMENT_ALIGNMENT = 128  # bytes, as ExecuTorch writes them
CONSTANT_ALIGNMENT = 16
LEAST = 1024  # bytes; sharing less is not worth a look


def shared(file: bytes) -> bytes:
    """The same .pte with no blob beside a constant of equal bytes; `file` itself where there is none."""
    header = _get_extended_header(file)
    if header is None:
        return file
    program = _flatbuffer_to_program(file[: header.program_size])
    segments = file[header.segment_base_offset :]
    blobs = [segments[s.offset : s.offset + s.size] for s in program.segments]
    inside = _places(program, blobs)
    return _joined(program, blobs, inside) if inside else file


def _places(program: Program, blobs: list[bytes]) -> dict[int, int]:
    """Segment to offset in the segment of the constants, for each blob that is one of them."""
    table = program.constant_segment
    if table is None or not table.offsets:
        return {}
    constants, found = blobs[table.segment_index], {}
    for index in {entry.segment_index for entry in program.named_data or []}:
        blob = blobs[index]
        if len(blob) < LEAST:
            continue
        places = [start for start in table.offsets if constants.startswith(blob, start)]
        if places:
            found[index] = places[0]
    return found


def _joined(program: Program, blobs: list[bytes], inside: dict[int, int]) -> bytes:
    """The file again, with new places of its segments. The constants' segment is the first one."""
    data = bytearray()
    for index, blob in enumerate(blobs):
        if index in inside:
            program.segments[index] = DataSegment(offset=inside[index], size=len(blob))
            continue
        data += bytes(-len(data) % SEGMENT_ALIGNMENT)
        program.segments[index] = DataSegment(offset=len(data), size=len(blob))
        data += blob
    return _with_program(program, bytes(data))


def _with_program(program: Program, segments: bytes) -> bytes:
    written = _program_to_flatbuffer(program, constant_tensor_alignment=CONSTANT_ALIGNMENT)
    room = -(-_ExtendedHeader.EXPECTED_LENGTH // written.max_alignment) * written.max_alignment
    size = room + len(written.data)
    base = -(-size // SEGMENT_ALIGNMENT) * SEGMENT_ALIGNMENT
    header = _ExtendedHeader(program_size=size, segment_base_offset=base, segment_data_size=len(segments)).to_bytes()
    head = _insert_flatbuffer_header(written.data, r"ET[0-9a-zA-Z][0-9a-zA-Z]", header.ljust(room, b"\0"))
    return bytes(head.ljust(base, b"\0") + segments)
