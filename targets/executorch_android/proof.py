"""The program against torch that rounds as XNNPACK does: proves that every code, scale and constant is in its place.

The budget covers what int8 rows cost, and would cover a small mistake with it. Torch that rounds the same rows to int8
and the same block scales to bfloat16 leaves nothing to float32 but its last bits, unless a value lies so near to the
border of two int8 steps that these decide: then the step differs, and in deep models others after it. How often that
happens is measured, on the same tokens: torch once more, with every row off by float32's last bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from exporter import adapters
from exporter.model import Model
from exporter.ops import Leaf
from exporter.plugins import Finding, Plan, Session
from exporter.torch_ops import TorchOps, fitting_threads
from exporter.weights import Dense, LowBit, nodes
from targets.executorch_android import layout
from targets.executorch_android.ops import quantized_rows
from targets.executorch_android.runner import open_session
from targets.executorch_android.uses import Uses

WHAT = "int8 rows in torch"
TEXTS, TOKENS = 32, 3  # texts are short, so that a step that differs spoils few of them, and each uses the cache
LAST_BITS = 2.0**-22  # relative; sums of some thousand float32 products in another order are off by about this
FLOAT_ERROR = 1e-5  # measured where no step differs: 3e-7
BEST = 1 / 8  # share of texts that must agree; a step differs in 29 of 32 here and not in 16 of 32 there once in 10^4


class RoundingOps(TorchOps):
    """The verbs in torch, rows and block scales rounded as XNNPACK rounds them.

    Args:
        model: With the weights that the plan stores.
        noise: Relative deviation of what each row is off by before it is rounded.
    """

    def __init__(self, model: Model, noise: float) -> None:
        super().__init__(model)
        self._noise, self._random = noise, torch.Generator().manual_seed(0)
        self._stored: dict[int, Dense] = {}  # by id of a leaf, which the model keeps alive

    def leaf(self, x: Tensor, weight: Leaf, site: str) -> Tensor:
        x = x * (1 + self._noise * torch.randn(x.shape, generator=self._random))
        if not isinstance(weight, LowBit):
            return super().leaf(x, weight, site)
        if id(weight) not in self._stored:
            self._stored[id(weight)] = Dense(_as_stored(weight).dense())
        return F.linear(quantized_rows(x), self._stored[id(weight)].values)


def exactness(folder: Path, model: Model, plan: Plan) -> list[Finding]:
    """Compare the logits after short texts; nothing where no row is rounded, and the budget itself is float32's."""
    if not any(isinstance(leaf, LowBit) for site in Uses(model).products for leaf in nodes(plan.weights[site])):
        return []
    texts = _texts(model.architecture.vocab, min(TOKENS, plan.context))
    stored = replace(model, weights=plan.weights)
    plain, wanted = _logits(TorchOps(stored), texts), _logits(RoundingOps(stored, 0.0), texts)
    shaken = _logits(RoundingOps(stored, LAST_BITS), texts)
    found = _quantile(_run(open_session(folder), texts), wanted, BEST)
    bound = max(FLOAT_ERROR, _quantile(shaken, wanted, 0.5))
    detail = f"relative L2 {found:.1e} in the best eighth of {TEXTS} texts, at most {bound:.1e}"
    cost = f"the rounding itself is a relative L2 of {_quantile(wanted, plain, 0.5):.1e} from float rows"
    return [Finding(WHAT, found <= bound, f"{detail}; {cost}")]


def _as_stored(weight: LowBit) -> LowBit:
    return replace(weight, scales=layout.stored_scales(weight).view(weight.scales.shape))


def _texts(vocab: int, tokens: int) -> Tensor:
    """[TEXTS, tokens]: ids all over the vocabulary, in no order."""
    return torch.randint(vocab, (TEXTS, tokens), generator=torch.Generator().manual_seed(0))


def _logits(ops: TorchOps, texts: Tensor) -> Tensor:
    """Logits after the last token of each text, [texts, vocab]."""
    with torch.inference_mode(), fitting_threads(ops.model.parameters):
        return adapters.logits(adapters.find(ops.model.architecture.family), ops, texts)[:, -1]


def _run(session: Session, texts: Tensor) -> Tensor:
    """The same from the runtime: all but one token in one call, the last in another; an encoder's in one."""
    return torch.stack([_last(session, text) for text in texts.tolist()])


def _last(session: Session, text: Sequence[int]) -> Tensor:
    session.reset()
    if not session.causal:
        return session.step(text)[-1]
    session.step(text[:-1])
    return session.step(text[-1:])[-1]


def _quantile(found: Tensor, wanted: Tensor, share: float) -> float:
    """A quantile of the relative errors of texts."""
    errors = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return float(errors.nan_to_num(torch.inf).quantile(share))
