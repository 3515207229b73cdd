"""Recurrent layers: a step's equations, and the walk along the sequence.

Sequences are [s, b, I], states [b, H]; weights of several gates lie below each other, [gates * H, ...]. A layer in
reverse gives its outputs in the order in which it reads; that half of a bidirectional layer, in the order of its input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import hardtanh, linear

from targets.coreml_ios.executor.values import flag, number, require_room

LONGEST = 2**20  # steps of a sequence
Hidden = tuple[Tensor, ...]  # [b, H] each: the hidden state first
Step = Callable[[Tensor, Hidden], Hidden]  # of an input's share of the gates [b, gates * H] and a state

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "scaled_tanh": torch.tanh,  # alpha tanh(beta x), where alpha and beta are 1
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": lambda x: (0.2 * x + 0.5).clamp(0, 1),
    "sigmoid_hard": lambda x: (0.2 * x + 0.5).clamp(0, 1),
    "relu": torch.relu,
    "linear": lambda x: x,
}


def rnn(
    x: Tensor, initial_h: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None = None,
    direction: str = "forward", output_sequence: Tensor | bool = False, activation: str = "tanh",
) -> Hidden:  # fmt: skip
    """`h = activation(W_ih x + W_hh h + b)`."""
    act = _activation(activation)

    def step(of_input: Tensor, state: Hidden) -> Hidden:
        return (act(of_input + linear(state[0], weight_hh)),)

    _require_fit(x, (initial_h,), weight_ih, weight_hh, (bias, 1))
    outputs, state = _walk(x, weight_ih, bias, (initial_h,), step, _is_reverse(direction))
    return _outputs(outputs, state, output_sequence)


def gru(
    x: Tensor, initial_h: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None = None,
    direction: str = "forward", output_sequence: Tensor | bool = False, recurrent_activation: str = "sigmoid",
    activation: str = "tanh", reset_after: Tensor | bool = False, input_bias: Tensor | None = None,
) -> Hidden:  # fmt: skip
    """`r, z = gate(W_i x + b_i + W_h h + b)`, `o = act(W_io x + b_io + W_ho (r h) + b_o)`, `h = (1 - z) o + z h`.

    With `reset_after`: `o = act(W_io x + b_io + r (W_ho h + b_o))`. Gates lie in the order r, o, z; `gate` is
    `recurrent_activation`, `act` is `activation`.
    """
    gate, act, is_after = _activation(recurrent_activation), _activation(activation), flag(reset_after)
    _require_fit(x, (initial_h,), weight_ih, weight_hh, (bias, 3), (input_bias, 3))
    weight_r, weight_o, weight_z = weight_hh.chunk(3)
    bias_r, bias_o, bias_z = (0, 0, 0) if bias is None else bias.chunk(3)

    def step(of_input: Tensor, state: Hidden) -> Hidden:
        (h,) = state
        x_r, x_o, x_z = of_input.chunk(3, dim=1)
        r = gate(x_r + linear(h, weight_r) + bias_r)
        z = gate(x_z + linear(h, weight_z) + bias_z)
        of_h = r * (linear(h, weight_o) + bias_o) if is_after else linear(r * h, weight_o) + bias_o
        return ((1 - z) * act(x_o + of_h) + z * h,)

    outputs, state = _walk(x, weight_ih, input_bias, (initial_h,), step, _is_reverse(direction))
    return _outputs(outputs, state, output_sequence)


def lstm(
    x: Tensor, initial_h: Tensor, initial_c: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None = None,
    peephole: Tensor | None = None, weight_ih_back: Tensor | None = None, weight_hh_back: Tensor | None = None,
    bias_back: Tensor | None = None, peephole_back: Tensor | None = None, direction: str = "forward",
    output_sequence: Tensor | bool = False, recurrent_activation: str = "sigmoid", cell_activation: str = "tanh",
    activation: str = "tanh", clip: Tensor | None = None,
) -> Hidden:  # fmt: skip
    """`i, f, o = gate(W x + W h + b + p c)`, `z = cell(W x + W h + b)`, `c = clip(f c + i z)`, `h = o act(c)`.

    `gate` is `recurrent_activation`, `cell` is `cell_activation`, `act` is `activation`. Gates lie in the order i, f,
    o, z; peepholes p in the order i, f, o, and that of o sees the new c. A bidirectional layer has both directions'
    states beside each other, [b, 2 H], and outputs likewise.
    """
    acts = [_activation(name) for name in (recurrent_activation, cell_activation, activation)]
    limit = number(clip, float("inf"))

    def walk(state: Hidden, w_x: Tensor, w_h: Tensor, b: Tensor | None, p: Tensor | None, is_reverse: bool) -> Any:
        _require_fit(x, state, w_x, w_h, (b, 4), (p, 3))
        return _walk(x, w_x, b, state, _lstm_step(w_h, p, acts, limit), is_reverse)

    if direction != "bidirectional":
        initial = initial_h, initial_c
        outputs, state = walk(initial, weight_ih, weight_hh, bias, peephole, _is_reverse(direction))
        return _outputs(outputs, state, output_sequence)
    if weight_ih_back is None or weight_hh_back is None:
        raise ValueError("a bidirectional layer has weights for both directions; weight_ih_back or _hh_back is missing")
    there, back = zip(initial_h.chunk(2, dim=1), initial_c.chunk(2, dim=1))
    outputs, state = walk(there, weight_ih, weight_hh, bias, peephole, False)
    outputs_back, state_back = walk(back, weight_ih_back, weight_hh_back, bias_back, peephole_back, True)
    both = torch.cat([outputs, outputs_back.flip(0)], dim=2)  # [s, b, 2 H]
    return _outputs(both, tuple(torch.cat(pair, dim=1) for pair in zip(state, state_back)), output_sequence)


def _lstm_step(
    weight: Tensor, peephole: Tensor | None, activations: list[Callable[[Tensor], Tensor]], clip: float
) -> Step:
    gate, cell, act = activations
    p_i, p_f, p_o = (0, 0, 0) if peephole is None else peephole.chunk(3)

    def step(of_input: Tensor, state: Hidden) -> Hidden:
        h, c = state
        i, f, o, z = (of_input + linear(h, weight)).chunk(4, dim=1)
        new = gate(f + p_f * c) * c + gate(i + p_i * c) * cell(z)
        new = hardtanh(new, -clip, clip)
        return gate(o + p_o * new) * act(new), new

    return step


def _require_fit(
    x: Tensor, states: Hidden, weight_ih: Tensor, weight_hh: Tensor, *vectors: tuple[Tensor | None, int]
) -> None:
    """Hold states, weights, and vectors of so many values a channel to each other: torch would broadcast them."""
    hidden = weight_hh.shape[-1]
    shapes = [list(state.shape) for state in states]
    if any(shape != [x.shape[1], hidden] for shape in shapes) or len(weight_ih) != len(weight_hh):
        given = f"states of {shapes}, weights of {list(weight_ih.shape)} and {list(weight_hh.shape)}"
        raise ValueError(f"{given} do not go with a sequence of {list(x.shape)}")
    for vector, count in vectors:
        if vector is not None and vector.shape != (count * hidden,):
            raise ValueError(f"biases or peepholes of {list(vector.shape)}; {hidden} channels take {count * hidden}")


def _walk(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Hidden, step: Step, is_reverse: bool
) -> tuple[Tensor, Hidden]:
    """Hidden states of every step [s, b, H], in the order of the steps, and the state after the last."""
    steps, batch, _ = x.shape
    require_room(steps * batch * len(weight))
    if steps > LONGEST:
        raise ValueError(f"a sequence of {steps} steps; up to {LONGEST} are computed here")
    of_inputs = linear(x.flip(0) if is_reverse else x, weight, bias)  # [s, b, gates * H]
    outputs = []
    for of_input in of_inputs:
        state = step(of_input, state)
        outputs.append(state[0])
    return torch.stack(outputs) if outputs else state[0][None][:0], state


def _outputs(outputs: Tensor, state: Hidden, output_sequence: Tensor | bool) -> Hidden:
    """The outputs of every step, or of the last, then the state."""
    return outputs if flag(output_sequence) else state[0][None], *state


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name.lower() not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name.lower()]


def _is_reverse(direction: str) -> bool:
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction {direction!r} is not one of this layer's")
    return direction == "reverse"


OPERATIONS: dict[str, Callable[..., Any]] = {"gru": gru, "lstm": lstm, "rnn": rnn}
