"""The few operations that our programs use, over torch in float32: says whether a graph means what it should.

A test's oracle, not a runtime: it knows no other programs and rounds nothing; constants come through our reader.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from targets.coreml_ios.reader import Package

TYPES = {"int32": torch.int32, "int16": torch.int32, "uint16": torch.int32, "fp16": torch.float32}


class SlowExecutor:
    """Runs a package token after token, as an app does: the caller makes the mask, the program keeps the states."""

    def __init__(self, package: Package, context: int) -> None:
        self.package, self.context = package, context
        self.fixed = {name: _tensor(package.constant(name).decode()) for name in package.constants()}
        self.causal = bool(package.interface().states)
        self.reset()

    def reset(self) -> None:
        shapes = self.package.interface().states
        self.states = {name: torch.zeros([n for n, _ in shape]) for name, (shape, _) in shapes.items()}
        self.past = 0

    def step(self, tokens: Sequence[int]) -> Tensor:
        count, end = len(tokens), self.past + len(tokens)
        values = {**self.fixed, "inputIds": torch.tensor([list(tokens)])}
        if self.causal:
            values["causalMask"] = torch.full((count, end), -1e4).triu(self.past + 1)[None, None]
        for operation in self.package.block.operations:
            if operation.type == "const" or operation.type.startswith("constexpr"):
                continue
            self._run(operation, values)
        self.past = end
        return values["logits" if self.causal else "lastHiddenState"][0]

    def _run(self, operation: Any, values: dict[str, Tensor]) -> None:
        names = {key: [binding.name for binding in argument.arguments] for key, argument in operation.inputs.items()}
        if operation.type == "read_state":
            values[operation.outputs[0].name] = self.states[names["input"][0]]
            return
        if operation.type == "write_state":
            self.states[names["input"][0]] = values[names["data"][0]]
            return
        given = {key: [self._value(name, values) for name in found] for key, found in names.items()}
        given = {key: found if key == "values" else found[0] for key, found in given.items()}
        values[operation.outputs[0].name] = OPERATIONS[operation.type](**given)

    def _value(self, name: str, values: dict[str, Tensor]) -> Any:
        if name in values:
            return values[name]
        strings = next(op for op in self.package.block.operations if op.outputs and op.outputs[0].name == name)
        return strings.attributes["val"].immediateValue.tensor.strings.values[0]


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array.astype("f4" if array.dtype.kind == "f" else "i8"))


def _places(x: Tensor, begin: Tensor, end: Tensor, begin_mask: Any, end_mask: Any) -> tuple[slice, ...]:
    ones, none = torch.ones(x.ndim), torch.zeros(x.ndim)
    open_begin, open_end = none if begin_mask is None else begin_mask, none if end_mask is None else end_mask
    assert len(begin) == len(end) == len(ones)
    return tuple(
        slice(0 if open_begin[i] else int(begin[i]), None if open_end[i] else int(end[i])) for i in range(x.ndim)
    )


def _slice(x: Tensor, begin: Tensor, end: Tensor, begin_mask: Any = None, end_mask: Any = None,
           squeeze_mask: Any = None) -> Tensor:  # fmt: skip
    squeezed = [i for i in range(x.ndim) if squeeze_mask is not None and squeeze_mask[i]]
    y = torch.as_tensor(x)[_places(x, begin, end, begin_mask, end_mask)]
    return y.squeeze(squeezed) if squeezed else y


def _update(x: Tensor, update: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    y = x.clone()
    assert y[_places(x, begin, end, None, None)].shape == update.shape
    y[_places(x, begin, end, None, None)] = update
    return y


def _gather(x: Tensor, indices: Tensor, axis: Tensor, **_: Any) -> Tensor:
    y = x.index_select(int(axis), indices.flatten())
    axis = int(axis) % x.ndim
    return y.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "identity": lambda x: x,
    "matmul": lambda x, y, transpose_x, transpose_y: x @ (y.mT if transpose_y else y),
    "linear": lambda x, weight, bias: F.linear(x, weight, bias),
    "reduce_mean": lambda x, axes, keep_dims: x.mean(axes.tolist(), keepdim=bool(keep_dims)),
    "rsqrt": lambda x, epsilon: torch.rsqrt(x + epsilon),
    "layer_norm": lambda x, axes, gamma, beta, epsilon: F.layer_norm(x, x.shape[-1:], gamma, beta, float(epsilon)),
    "silu": lambda x: F.silu(x),
    "relu": lambda x: F.relu(x),
    "gelu": lambda x, mode: F.gelu(x, approximate="none" if mode == "EXACT" else "tanh"),
    "shape": lambda x: torch.tensor(x.shape),
    "cast": lambda x, dtype: x.to(TYPES[dtype]),
    "greater_equal": lambda x, y: x >= y,
    "select": lambda cond, a, b: torch.where(cond, a, b),
    "range_1d": lambda start, end, step: torch.arange(int(start), int(end), int(step)),
    "concat": lambda values, axis, interleave: torch.cat([v if v.ndim else v[None] for v in values], int(axis)),
    "expand_dims": lambda x, axes: x.reshape(_expanded(x.shape, axes.tolist())),
    "reshape": lambda x, shape: x.reshape(shape.tolist()),
    "transpose": lambda x, perm: x.permute(perm.tolist()),
    "tile": lambda x, reps: x.repeat(reps.tolist()),
    "pad": lambda x, pad, mode, constant_val: F.pad(x, pad.tolist()[-2:]),
    "gather": _gather,
    "slice_by_index": _slice,
    "slice_update": _update,
    "squeeze": lambda x, axes: x.squeeze(axes.tolist()),
    "scaled_dot_product_attention": lambda query, key, value, attn_mask=None: F.scaled_dot_product_attention(
        query, key, value, attn_mask
    ),
}


def _expanded(shape: Sequence[int], axes: Sequence[int]) -> list[int]:
    sizes = list(shape)
    for axis in sorted(axes):
        sizes.insert(axis, 1)
    return sizes
