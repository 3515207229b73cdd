"""Text to tokens and back, by the checkpoint's own tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tokenizers

from exporter.errors import CheckpointError

FILE = "tokenizer.json"


class Tokenizer:
    """A checkpoint's tokenizer.

    Args:
        files: A model's files by name; `tokenizer.json` must be among them.
        bos: First token of every text, or None.

    Raises:
        CheckpointError: there is no tokenizer.json, or it cannot be read.
    """

    def __init__(self, files: Mapping[str, bytes], bos: int | None) -> None:
        if FILE not in files:
            raise CheckpointError(f"the model has no {FILE}; put it beside config.json, then export again")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(files[FILE].decode())
        except Exception as error:  # the library raises bare Exception for every malformed file
            raise CheckpointError(f"{FILE} cannot be read: {error}") from None
        self.bos = bos

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, the BOS token first where the model has one; the empty text is the BOS token alone."""
        tokens = self.encode_plain(text) if text else []
        return tokens if self.bos is None else [self.bos, *tokens]

    def encode_plain(self, text: str) -> list[int]:
        """Tokens of a text, without a BOS token."""
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens; special ones are left out."""
        text: str = self._tokenizer.decode(list(tokens))
        return text
