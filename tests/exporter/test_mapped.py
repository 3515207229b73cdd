"""Safetensors files as views: what the library writes and reads, without the memory."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exporter import mapped
from exporter.errors import CheckpointError
from exporter.mapped import Leaf, leaf

KINDS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16,
         torch.int8, torch.uint8, torch.bool)  # fmt: skip


def every_kind() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {f"{name}.{index}": torch.randint(0, 2, (3, 5), generator=generator).to(kind)
             for index, kind in enumerate(KINDS) for name in "ba"}  # fmt: skip
    return {**found, "empty": torch.zeros(0, 4), "scalar": torch.tensor(7.0), "ü": torch.ones(2)}


def test_a_file_is_byte_for_byte_what_the_library_writes(tmp_path: Path) -> None:
    tensors = every_kind()
    save_file(tensors, tmp_path / "library")
    mapped.write(tmp_path / "ours", {name: leaf(tensor) for name, tensor in tensors.items()})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()


def test_views_are_what_the_library_reads(tmp_path: Path) -> None:
    save_file(every_kind(), tmp_path / "file", metadata={"made": "by a test"})
    found, expected = mapped.read(tmp_path / "file"), load_file(tmp_path / "file")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(found[name].dtype == expected[name].dtype for name in expected)


def test_a_tensor_that_lies_crooked_is_read_right(tmp_path: Path) -> None:
    values = torch.arange(6, dtype=torch.float64)
    save_file({"a": values}, tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip() + b" " * 3  # no multiple of 8 any more
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    assert len(header) % 8
    assert torch.equal(mapped.read(tmp_path / "file")["a"], values)


def test_released_views_come_back_from_the_file(tmp_path: Path) -> None:
    save_file(every_kind(), tmp_path / "file")
    found, expected = mapped.read(tmp_path / "file"), every_kind()
    for _ in range(3):
        mapped.release()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_view_outlives_whatever_read_it(tmp_path: Path) -> None:
    save_file({"a": torch.arange(1000)}, tmp_path / "file")
    view = mapped.read(tmp_path / "file")["a"][500:]
    (tmp_path / "file").unlink()
    mapped.release()
    assert view.tolist() == list(range(500, 1000))


def test_writing_to_a_view_never_reaches_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1000)}, tmp_path / "file")
    before = hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
    mapped.read(tmp_path / "file")["a"].fill_(1.0)
    assert hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest() == before


def test_a_type_that_is_not_known_is_refused_with_choices(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(8, dtype=torch.uint8)}, tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(content.replace(b'"U8"', b'"F4"').replace(b"[8]", b"[16]", 1))
    with pytest.raises(CheckpointError, match=r"file is damaged: "):
        mapped.read(tmp_path / "file")


def test_leaves_are_made_one_after_another(tmp_path: Path) -> None:
    seen: list[str] = []

    def maker(name: str) -> Leaf:
        return Leaf(torch.float32, (2,), lambda: (seen.append(name), torch.ones(2))[1])

    mapped.write(tmp_path / "file", {name: maker(name) for name in "cab"})
    assert seen == ["a", "b", "c"]


RESIDENT = """
import sys
from pathlib import Path
from exporter import mapped

def resident():  # of the file alone: summing brings pages of torch's own libraries into memory too
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    next(line for line in lines if line.endswith(sys.argv[1]))
    return int(next(line for line in lines if line.startswith("Rss:")).split()[1]) // 1024

tensors = mapped.read(Path(sys.argv[1]))
opened = resident()
float(tensors["a"].sum())
read = resident()
mapped.release()
print(opened, read, resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_released_is_out_of_memory(tmp_path: Path) -> None:
    save_file({"a": torch.ones(64 * 2**20 // 4)}, tmp_path / "file")  # 64 MiB
    said = subprocess.run(
        [sys.executable, "-c", RESIDENT, str(tmp_path / "file")], check=True, capture_output=True, text=True
    ).stdout
    opened, read, released = map(int, said.split())
    assert opened <= 1
    assert read == 64
    assert released <= 1
