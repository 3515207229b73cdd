"""Gram matrices: sums of x x^T over tokens, of which half is worked out and the rest mirrored."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

BLOCK = 256  # columns: products of this height run at full speed, and little under the diagonal is worked out
AT_ONCE = 4096  # tokens that are summed in the type of the inputs


class Gram:
    """A sum of x x^T over tokens that come batch after batch.

    Products of up to AT_ONCE tokens are added up in the type of the inputs, and these sums in float64. Of n columns,
    only the blocks on and over the diagonal are worked out: (n + BLOCK) / 2n of the products.
    """

    def __init__(self) -> None:
        self._recent: Tensor | None = None  # [in, in], of the latest tokens, in their type; upper blocks only
        self._tokens = 0  # in `_recent`
        self._whole: Tensor | None = None  # [in, in], float64; upper blocks only

    def add(self, x: Tensor) -> None:
        """Add tokens [..., in], of the float type and on the device of the first ones."""
        for tokens in torch.split(x.flatten(0, -2), AT_ONCE):
            if self._tokens + len(tokens) > AT_ONCE:
                self._flush()
            self._multiply(tokens)

    def total(self) -> Tensor:
        """The sum, [in, in], float64, exactly symmetric; tokens that are added later change it."""
        self._flush()
        assert self._whole is not None, "a Gram matrix of no tokens"
        self._recent = None
        for columns in _blocks(len(self._whole)):
            diagonal = self._whole[columns, columns]
            diagonal.copy_(diagonal.triu() + diagonal.triu(1).T)
            self._whole[columns.stop :, columns] = self._whole[columns, columns.stop :].T
        return self._whole

    def _multiply(self, tokens: Tensor) -> None:
        """Add tokens [tokens, in] to the recent sum, or begin a new one with them."""
        if self._recent is None:
            self._recent = _square(tokens, tokens.dtype)
        for columns in _blocks(tokens.shape[1]):
            right = slice(columns.start, None)
            self._recent[columns, right].addmm_(tokens[:, columns].T, tokens[:, right], beta=min(self._tokens, 1))
        self._tokens += len(tokens)

    def _flush(self) -> None:
        """Add the recent sum to the whole one."""
        if self._recent is None or not self._tokens:
            return
        if self._whole is None:
            self._whole = _square(self._recent, torch.float64).zero_()
        for columns in _blocks(len(self._recent)):
            right = slice(columns.start, None)
            self._whole[columns, right] += self._recent[columns, right]
        self._tokens = 0


def cross(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum of y x^T over pairs of batches of tokens, y and x each [..., in]: [in of y, in of x], float64."""
    products = (y.flatten(0, -2).T @ x.flatten(0, -2) for y, x in pairs)
    whole = next(products).double()
    for product in products:
        whole += product
    return whole


def _blocks(width: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, width)) for start in range(0, width, BLOCK)]


def _square(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """[in, in], an ordinary tensor also where the tokens are inference tensors."""
    with torch.inference_mode(False):
        return torch.empty(tokens.shape[-1], tokens.shape[-1], dtype=dtype, device=tokens.device)
