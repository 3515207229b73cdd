"""Text to tokens and back, by the checkpoint's own tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tokenizers

from exporter.errors import CheckpointError
from exporter.model import Model

FILE = "tokenizer.json"


class Tokenizer:
    """A checkpoint's tokenizer.

    Args:
        files: A model's files by name; `tokenizer.json` must be among them.
        bos: First token of every text, or None.
        vocab: Tokens that the model has, or None where none is asked about.

    Raises:
        CheckpointError: there is no tokenizer.json, or it cannot be read.
    """

    def __init__(self, files: Mapping[str, bytes], bos: int | None, vocab: int | None = None) -> None:
        if FILE not in files:
            raise CheckpointError(f"the model has no {FILE}; put it beside config.json, then export again")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(files[FILE].decode())
        except Exception as error:  # the library raises bare Exception for every malformed file
            raise CheckpointError(f"{FILE} cannot be read: {error}") from None
        self._tokenizer.no_truncation()  # what a checkpoint's batches were cut and filled to is not our text's length
        self._tokenizer.no_padding()
        self.bos, self._vocab = bos, vocab

    @classmethod
    def of(cls, model: Model) -> Tokenizer:
        """A model's own tokenizer.

        Raises:
            CheckpointError: it has none, or it cannot be read.
        """
        return cls(model.files, model.architecture.bos, model.architecture.vocab)

    @property
    def frame(self) -> list[int]:
        """The tokens that the tokenizer itself puts around every text, such as [CLS] and [SEP]."""
        tokens: list[int] = self._tokenizer.encode("").ids
        return tokens

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, the BOS token first where the model has one; the empty text is the BOS token alone."""
        tokens = self.encode_plain(text) if text else []
        return tokens if self.bos is None else [self.bos, *tokens]

    def encode_plain(self, text: str) -> list[int]:
        """Tokens of a text, without a BOS token.

        Raises:
            CheckpointError: the text is not Unicode, or takes a token that the model does not have.
        """
        try:
            tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:  # what the library makes of bytes of the command line that are no UTF-8
            raise CheckpointError("the text is not Unicode; give it in UTF-8") from None
        if self._vocab is not None and tokens and max(tokens) >= self._vocab:
            raise CheckpointError(f"{FILE} gives token {max(tokens)}; the model has {self._vocab}: one is another's")
        return tokens

    def word(self, token: int) -> str:
        """A token as the tokenizer spells it, special ones too; its number where it has no spelling."""
        return self._tokenizer.id_to_token(token) or str(token)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens; special ones are left out."""
        text: str = self._tokenizer.decode(list(tokens))
        return text
