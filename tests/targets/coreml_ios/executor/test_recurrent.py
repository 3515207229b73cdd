"""Recurrent layers: against torch.nn's own, and what torch has not, step by step in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporter.errors import ArtifactError
from targets.coreml_ios.backend import mb
from targets.coreml_ios.executor.ops import OPERATIONS
from tests.targets.coreml_ios.executor.programs import runnable

STEPS, BATCH, WIDTH, HIDDEN = 5, 3, 4, 6
LSTM_FROM_TORCH = (0, 1, 3, 2)  # torch's gates are i, f, z, o; MIL's i, f, o, z
GRU_FROM_TORCH = (0, 2, 1)  # torch's are r, z, o; MIL's r, o, z
Array = NDArray[np.float64]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng((seed, *shape)).normal(size=shape)).float()


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def ordered(weight: Tensor, order: tuple[int, ...]) -> Tensor:
    """Gates of torch in MIL's order."""
    parts = weight.detach().chunk(len(order))
    return torch.cat([parts[place] for place in order])


def close(found: Tensor, wanted: Any) -> None:
    wanted = wanted.detach().numpy() if isinstance(wanted, Tensor) else wanted
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-6)


def lstm_weights(layer: torch.nn.LSTM, suffix: str = "") -> tuple[Tensor, Tensor, Tensor]:
    own = layer.state_dict()
    weights = [ordered(own[f"weight_{kind}_l0{suffix}"], LSTM_FROM_TORCH) for kind in ("ih", "hh")]
    bias = ordered(own[f"bias_ih_l0{suffix}"] + own[f"bias_hh_l0{suffix}"], LSTM_FROM_TORCH)
    return weights[0], weights[1], bias


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_rnn_is_torchs(activation: str) -> None:
    layer, x, h = torch.nn.RNN(WIDTH, HIDDEN, nonlinearity=activation), drawn(STEPS, BATCH, WIDTH), drawn(BATCH, HIDDEN)
    own = layer.state_dict()
    wanted, last = layer(x, h[None])
    bias = own["bias_ih_l0"] + own["bias_hh_l0"]
    found, state = OPERATIONS["rnn"](x, h, own["weight_ih_l0"], own["weight_hh_l0"], bias, output_sequence=True,
                                     activation=activation)  # fmt: skip
    close(found, wanted)
    close(state, last[0])


def test_lstm_is_torchs() -> None:
    layer, x = torch.nn.LSTM(WIDTH, HIDDEN), drawn(STEPS, BATCH, WIDTH)
    h, c = drawn(BATCH, HIDDEN), drawn(BATCH, HIDDEN, seed=1)
    wanted, (last_h, last_c) = layer(x, (h[None], c[None]))
    found = OPERATIONS["lstm"](x, h, c, *lstm_weights(layer), output_sequence=torch.tensor(True))
    for one, other in zip(found, (wanted, last_h[0], last_c[0]), strict=True):
        close(one, other)


def test_a_bidirectional_lstm_is_torchs() -> None:
    layer, x = torch.nn.LSTM(WIDTH, HIDDEN, bidirectional=True), drawn(STEPS, BATCH, WIDTH)
    h, c = drawn(BATCH, 2 * HIDDEN), drawn(BATCH, 2 * HIDDEN, seed=1)
    wanted, (last_h, last_c) = layer(x, (torch.stack(h.chunk(2, 1)), torch.stack(c.chunk(2, 1))))
    (ih, hh, b), (ih_back, hh_back, b_back) = lstm_weights(layer), lstm_weights(layer, "_reverse")
    found = OPERATIONS["lstm"](x, h, c, ih, hh, b, weight_ih_back=ih_back, weight_hh_back=hh_back, bias_back=b_back,
                               direction="bidirectional", output_sequence=True)  # fmt: skip
    for one, other in zip(found, (wanted, torch.cat([*last_h], 1), torch.cat([*last_c], 1)), strict=True):
        close(one, other)


def test_gru_that_resets_after_is_torchs() -> None:
    layer, x, h = torch.nn.GRU(WIDTH, HIDDEN), drawn(STEPS, BATCH, WIDTH), drawn(BATCH, HIDDEN)
    ih, hh, b_ih, b_hh = (ordered(weight, GRU_FROM_TORCH) for weight in layer.state_dict().values())
    wanted, last = layer(x, h[None])
    found, state = OPERATIONS["gru"](x, h, ih, hh, b_hh, output_sequence=True, reset_after=True, input_bias=b_ih)
    close(found, wanted)
    close(state, last[0])


def test_gru_resets_before_where_it_is_not_told() -> None:
    x, h = drawn(STEPS, BATCH, WIDTH), drawn(BATCH, HIDDEN)
    ih, hh, bias = drawn(3 * HIDDEN, WIDTH), drawn(3 * HIDDEN, HIDDEN), drawn(3 * HIDDEN)
    (i_r, i_o, i_z), (h_r, h_o, h_z), (b_r, b_o, b_z) = (np.split(w.double().numpy(), 3) for w in (ih, hh, bias))
    state = h.double().numpy()
    for row in x.double().numpy():
        r = sigmoid(row @ i_r.T + state @ h_r.T + b_r)
        z = sigmoid(row @ i_z.T + state @ h_z.T + b_z)
        o = np.tanh(row @ i_o.T + (r * state) @ h_o.T + b_o)
        state = (1 - z) * o + z * state
    last, found = OPERATIONS["gru"](x, h, ih, hh, bias)
    close(found, state)
    close(last, state[None])


@pytest.mark.parametrize("clip", [None, 0.25])
def test_lstm_with_peepholes_and_a_bound(clip: float | None) -> None:
    x, h, c = drawn(STEPS, BATCH, WIDTH), drawn(BATCH, HIDDEN), drawn(BATCH, HIDDEN, seed=1)
    ih, hh, bias, peep = drawn(4 * HIDDEN, WIDTH), drawn(4 * HIDDEN, HIDDEN), drawn(4 * HIDDEN), drawn(3 * HIDDEN)
    p_i, p_f, p_o = np.split(peep.double().numpy(), 3)
    hidden, cell = h.double().numpy(), c.double().numpy()
    for row in x.double().numpy():
        gates = row @ ih.double().numpy().T + hidden @ hh.double().numpy().T + bias.double().numpy()
        i, f, o, z = np.split(gates, 4, axis=1)
        cell = sigmoid(f + p_f * cell) * cell + sigmoid(i + p_i * cell) * np.tanh(z)
        cell = cell if clip is None else cell.clip(-clip, clip)
        hidden = sigmoid(o + p_o * cell) * np.tanh(cell)
    given = {} if clip is None else {"clip": torch.tensor(clip)}
    _, found_h, found_c = OPERATIONS["lstm"](x, h, c, ih, hh, bias, peep, **given)
    close(found_h, hidden)
    close(found_c, cell)


def test_a_layer_in_reverse_is_the_layer_on_a_sequence_that_is_reversed() -> None:
    x, h, c = drawn(STEPS, BATCH, WIDTH), drawn(BATCH, HIDDEN), drawn(BATCH, HIDDEN, seed=1)
    for name, gates, states in (("rnn", 1, (h,)), ("gru", 3, (h,)), ("lstm", 4, (h, c))):
        weights = drawn(gates * HIDDEN, WIDTH), drawn(gates * HIDDEN, HIDDEN)
        there = OPERATIONS[name](x, *states, *weights, direction="reverse", output_sequence=True)
        back = OPERATIONS[name](x.flip(0), *states, *weights, output_sequence=True)
        for one, other in zip(there, back, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("tanh", np.tanh), ("scaled_tanh", np.tanh), ("sigmoid", sigmoid), ("relu", lambda x: np.maximum(x, 0)),
     ("linear", lambda x: x), ("sigmoid_hard", lambda x: np.clip(0.2 * x + 0.5, 0, 1)),
     ("hard_sigmoid", lambda x: np.clip(0.2 * x + 0.5, 0, 1))],
)  # fmt: skip
def test_every_activation(name: str, expected: Any) -> None:
    x, zero = drawn(1, BATCH, HIDDEN) * 3, torch.zeros(BATCH, HIDDEN)
    found, _ = OPERATIONS["rnn"](x, zero, torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN), activation=name)
    close(found, expected(x.double().numpy()))


def test_a_sequence_of_no_steps_keeps_its_state() -> None:
    h = drawn(BATCH, HIDDEN)
    found, state = OPERATIONS["rnn"](drawn(0, BATCH, WIDTH), h, drawn(HIDDEN, WIDTH), drawn(HIDDEN, HIDDEN),
                                     output_sequence=True)  # fmt: skip
    assert list(found.shape) == [0, BATCH, HIDDEN]
    assert torch.equal(state, h)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"activation": "swish"}, "activation 'swish' is not one of tanh, "),
        ({"direction": "bidirectional"}, "direction 'bidirectional' is not one of this layer's"),
        ({"x": torch.zeros(1).expand(2**20 + 1, 1, 1)}, f"a sequence of {2**20 + 1} steps"),
    ],
)
def test_what_no_layer_is_given_is_refused(given: dict[str, Any], said: str) -> None:
    one = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=said):
        OPERATIONS["rnn"](**{"x": one[None], "initial_h": one, "weight_ih": one, "weight_hh": one, **given})


def test_a_bidirectional_layer_without_a_way_back_is_refused() -> None:
    with pytest.raises(ValueError, match="weight_ih_back or _hh_back is missing"):
        OPERATIONS["lstm"](*[torch.zeros(1, 1)] * 5, direction="bidirectional")


def test_a_sequence_that_no_memory_holds_is_refused() -> None:
    with pytest.raises(ArtifactError, match="more than the"):
        OPERATIONS["rnn"](torch.zeros(1).expand(2**20, 2**10, 1), torch.zeros(2**10, 1), *[torch.zeros(1, 1)] * 2)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("rnn", {"initial_h": torch.zeros(2, 1)}), ("rnn", {"initial_h": torch.zeros(1, 2)}),
        ("rnn", {"weight_hh": torch.zeros(2, 1)}), ("rnn", {"bias": torch.zeros(2)}),
        ("gru", {"input_bias": torch.zeros(4)}), ("gru", {"bias": torch.zeros(1)}),
        ("lstm", {"initial_c": torch.zeros(2, 1)}), ("lstm", {"peephole": torch.zeros(4)}),
    ],
)  # fmt: skip
def test_parts_that_torch_would_broadcast_are_refused(name: str, given: dict[str, Any]) -> None:
    gates = {"rnn": 1, "gru": 3, "lstm": 4}[name]
    weights = {"weight_ih": torch.zeros(gates, 1), "weight_hh": torch.zeros(gates, 1)}
    states = {"initial_h": torch.zeros(1, 1), **({"initial_c": torch.zeros(1, 1)} if name == "lstm" else {})}
    OPERATIONS[name](torch.zeros(1, 1, 1), **states, **weights)
    with pytest.raises(ValueError, match=r"do not go with a sequence of \[1, 1, 1\]|1 channels take"):
        OPERATIONS[name](torch.zeros(1, 1, 1), **{**states, **weights, **given})


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def test_each_activation_of_an_lstm_has_its_place() -> None:
    x, h, c = drawn(1, BATCH, WIDTH), drawn(BATCH, HIDDEN), drawn(BATCH, HIDDEN, seed=1)
    ih, hh = drawn(4 * HIDDEN, WIDTH), drawn(4 * HIDDEN, HIDDEN)
    gates = x[0].double().numpy() @ ih.double().numpy().T + h.double().numpy() @ hh.double().numpy().T
    i, f, o, z = np.split(gates, 4, axis=1)
    cell = relu(f) * c.double().numpy() + relu(i) * np.tanh(z)
    found = OPERATIONS["lstm"](x, h, c, ih, hh, recurrent_activation="ReLU", cell_activation="Tanh",
                               activation="sigmoid")  # fmt: skip
    close(found[1], relu(o) * sigmoid(cell))
    close(found[2], cell)


def test_each_activation_of_a_gru_has_its_place() -> None:
    x, h = drawn(1, BATCH, WIDTH), drawn(BATCH, HIDDEN)
    ih, hh = drawn(3 * HIDDEN, WIDTH), drawn(3 * HIDDEN, HIDDEN)
    (x_r, x_o, x_z), (h_r, h_o, h_z) = (np.split(w.double().numpy(), 3) for w in (ih, hh))
    one, state = x[0].double().numpy(), h.double().numpy()
    r, z = relu(one @ x_r.T + state @ h_r.T), relu(one @ x_z.T + state @ h_z.T)
    o = sigmoid(one @ x_o.T + (r * state) @ h_o.T)
    found = OPERATIONS["gru"](x, h, ih, hh, recurrent_activation="relu", activation="sigmoid")
    close(found[1], (1 - z) * o + z * state)


def test_a_bidirectional_layer_is_a_layer_there_and_one_back() -> None:
    """With peepholes of its own in each direction, and without the sequence."""
    x, h, c = drawn(STEPS, BATCH, WIDTH), drawn(BATCH, 2 * HIDDEN), drawn(BATCH, 2 * HIDDEN, seed=1)
    weights = [(drawn(4 * HIDDEN, WIDTH, seed=s), drawn(4 * HIDDEN, HIDDEN, seed=s), drawn(4 * HIDDEN, seed=s),
                drawn(3 * HIDDEN, seed=s)) for s in (2, 3)]  # fmt: skip
    back = dict(zip(("weight_ih_back", "weight_hh_back", "bias_back", "peephole_back"), weights[1]))
    given = {**back, "direction": "bidirectional"}
    both = OPERATIONS["lstm"](x, h, c, *weights[0], **given)
    halves = [OPERATIONS["lstm"](x, h[:, part], c[:, part], *own, direction=way)
              for part, own, way in ((slice(HIDDEN), weights[0], "forward"),
                                     (slice(HIDDEN, None), weights[1], "reverse"))]  # fmt: skip
    for place, found in enumerate(both):
        assert torch.equal(found, torch.cat([half[place] for half in halves], dim=-1))
    whole = OPERATIONS["lstm"](x, h, c, *weights[0], **given, output_sequence=True)
    assert torch.equal(whole[0][-1, :, :HIDDEN], both[0][0, :, :HIDDEN])
    assert torch.equal(whole[0][0, :, HIDDEN:], both[0][0, :, HIDDEN:])


def test_a_program_of_both_directions_is_torchs() -> None:
    """The order of gates, states and outputs survives coremltools' own writing."""
    layer, x = torch.nn.LSTM(WIDTH, HIDDEN, bidirectional=True), drawn(STEPS, BATCH, WIDTH)
    (ih, hh, b), (ih_back, hh_back, b_back) = (
        [part.numpy() for part in lstm_weights(layer, suffix)] for suffix in ("", "_reverse")
    )
    zero = np.zeros((BATCH, 2 * HIDDEN), np.float32)

    def program(x: Any) -> Any:
        return mb.lstm(x=x, initial_h=zero, initial_c=zero, weight_ih=ih, weight_hh=hh, bias=b, weight_ih_back=ih_back,
                       weight_hh_back=hh_back, bias_back=b_back, direction="bidirectional", output_sequence=True,
                       name="y")  # fmt: skip

    found = runnable(program, [mb.TensorSpec(x.shape)]).predict({"x": x})
    outputs, (h, c) = layer(x)
    for one, other in zip(found.values(), (outputs, torch.cat([*h], 1), torch.cat([*c], 1)), strict=True):
        np.testing.assert_allclose(one, other.detach().numpy(), rtol=1e-5, atol=1e-6)
