"""A tokenizer file for runners that turn tokens to text one at a time.

ExecuTorch's LLM runners decode each token alone. A decoder that strips the leading space of a text then strips that of
every word: "Onceuponatime". The file written here is tokenizer.json with such steps taken out of its decoder; ids are
the same, and the text begins with the space that its first token has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

SOURCE, FILE = "tokenizer.json", "tokenizer-runner.json"


def tokenizer(files: Mapping[str, bytes]) -> bytes | None:
    """The tokenizer for runners, or None where tokenizer.json itself serves, or there is none."""
    if SOURCE not in files:
        return None
    said: dict[str, Any] = json.loads(files[SOURCE])
    steps = _steps(said.get("decoder"))
    kept = [step for old in steps for step in _without_strip(old)]
    if kept == steps:
        return None
    changed = {**said, "decoder": {"type": "Sequence", "decoders": kept}}
    return (json.dumps(changed, ensure_ascii=False, indent=1) + "\n").encode()


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A decoder as a list of steps."""
    if decoder is None:
        return []
    return list(decoder["decoders"]) if decoder["type"] == "Sequence" else [decoder]


def _without_strip(step: dict[str, Any]) -> list[dict[str, Any]]:
    """What stands for one step: nothing for a strip, a plain replacement for Metaspace (which strips, too)."""
    if step["type"] == "Strip" and step.get("start"):
        return []
    if step["type"] == "Metaspace":
        mark = step.get("replacement", "\u2581")
        return [{"type": "Replace", "pattern": {"String": mark}, "content": " "}, {"type": "Fuse"}]
    return [step]
