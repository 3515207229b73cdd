"""The target as an object, and the tokenizer that it writes; nothing here lowers a model."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest

from exporter.errors import BackendMissingError
from targets.executorch_android import TARGET, spoken
from tests.models import LLAMA, random_model


def test_importing_the_target_imports_no_executorch() -> None:
    code = (
        "import sys; from targets.executorch_android import TARGET; from tests.models import LLAMA, random_model;"
        "TARGET.plan(random_model(LLAMA), 32); print([m for m in sys.modules if m.split('.')[0] == 'executorch'])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_a_missing_back_end_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name="executorch")

    monkeypatch.setattr(importlib, "import_module", missing)

    with pytest.raises(BackendMissingError, match=r"needs executorch.*pip install 'pocket-exporter\[executorch\]'"):
        TARGET.session(__file__)  # type: ignore[arg-type]


def test_a_float32_budget_is_that_of_sums_in_another_order() -> None:
    model = random_model(LLAMA)

    assert TARGET.budget(model, TARGET.plan(model, 32)).relative_l2 == 1e-5


def decoder_of(decoder: dict[str, object] | None) -> object:
    """The decoder that runners get for a tokenizer with this one; None where they get no file of their own."""
    written = spoken.tokenizer({"tokenizer.json": json.dumps({"model": {}, "decoder": decoder}).encode()})
    return None if written is None else json.loads(written)["decoder"]["decoders"]


def test_steps_that_strip_the_first_space_are_left_out_for_runners() -> None:
    replace = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}

    assert decoder_of({"type": "Sequence", "decoders": [replace, {"type": "Fuse"}, strip]}) == [
        replace,
        {"type": "Fuse"},
    ]
    assert decoder_of({"type": "Metaspace", "replacement": "\u2581"}) == [replace, {"type": "Fuse"}]


def test_a_tokenizer_that_keeps_spaces_is_not_written_twice() -> None:
    assert decoder_of({"type": "ByteLevel"}) is None
    assert decoder_of(None) is None
    assert spoken.tokenizer({}) is None
