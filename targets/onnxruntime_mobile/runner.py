"""An exported folder running in ONNX Runtime on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from exporter.errors import ArtifactError
from exporter.session import EncoderSession, require_step
from targets.onnxruntime_mobile.constants import MODEL
from targets.onnxruntime_mobile.ops import HIDDEN
from targets.onnxruntime_mobile.readback import read_model

PROVIDERS = ["CPUExecutionProvider"]
LONGEST = 2**24  # tokens


class OnnxSession:
    """One sequence, token after token; the key-value buffer of the whole context is read and written in place.

    There is no padding: the attention mask is all ones. GroupQueryAttention counts positions from the mask's width,
    so a mask that begins with zeros (left padding) would be silently wrong.

    Args:
        session: Of a decoder's graph.
    """

    causal = True

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session, self._binding = session, session.io_binding()
        self._buffers: list[object] = []  # before 1.31 a binding does not keep them alive
        self.context = _stated(session, "context")
        inputs = {value.name: value for value in session.get_inputs()}
        self._vocab = int(session.get_outputs()[0].shape[-1])
        for name, value in inputs.items():
            if name.startswith("past_key_values."):
                self._share(name, (1, int(value.shape[1]), self.context, int(value.shape[3])))
        self.reset()

    def _share(self, name: str, shape: tuple[int, ...]) -> None:
        """One buffer, [1, kv_heads, context, head size], as a layer's past and its present."""
        buffer = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
        self._buffers.append(buffer)
        self._binding.bind_ortvalue_input(name, buffer)
        self._binding.bind_ortvalue_output(name.replace("past_key_values.", "present."), buffer)

    def reset(self) -> None:
        """Forget every token."""
        self._count = 0

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append tokens; returns the logits after each of them, [tokens, vocab], float32.

        Raises:
            TargetError: no token, one that the vocabulary lacks, or more than the context holds.
            ArtifactError: the runtime cannot run the graph.
        """
        require_step(tokens, self._vocab, self._count, self.context)
        count = self._count + len(tokens)
        ids, mask = np.array([tokens], np.int64), np.ones((1, count), np.int64)
        self._binding.bind_cpu_input("input_ids", ids)
        self._binding.bind_cpu_input("attention_mask", mask)
        logits = torch.empty(1, len(tokens), self._vocab)
        self._binding.bind_output("logits", "cpu", 0, np.float32, tuple(logits.shape), logits.data_ptr())
        _run(self._session, self._binding)
        self._count = count
        return logits[0]


def _encoder(session: onnxruntime.InferenceSession) -> EncoderSession:
    """A session of an encoder's graph."""
    width = int(session.get_outputs()[0].shape[-1])

    def hidden_states(tokens: Sequence[int]) -> Tensor:
        binding, hidden = session.io_binding(), torch.empty(1, len(tokens), width)
        binding.bind_cpu_input("input_ids", np.array([tokens], np.int64))
        binding.bind_output(HIDDEN, "cpu", 0, np.float32, tuple(hidden.shape), hidden.data_ptr())
        _run(session, binding)
        return hidden[0]

    return EncoderSession(_stated(session, "context"), _stated(session, "vocab"), hidden_states)


def _run(session: onnxruntime.InferenceSession, binding: onnxruntime.IOBinding) -> None:
    try:
        session.run_with_iobinding(binding)
    except RuntimeError as error:
        raise ArtifactError(f"the graph does not run in onnxruntime {onnxruntime.__version__}: {error}") from None


def open_session(path: Path, threads: int = 1) -> OnnxSession | EncoderSession:
    """Run a model.onnx, its data beside it, or a model.ort.

    Raises:
        ArtifactError: the file is not what this target writes.
    """
    if path.name == MODEL:
        read_model(path.parent)  # its references checked before the runtime follows them
    return _session_of(_load(str(path), _options(threads), str(path)))


def exact_session(folder: Path, threads: int = 1) -> OnnxSession | EncoderSession:
    """The same graph with float32 activations (accuracy_level 0): slow, and proves that every code is in its place."""
    model = read_model(folder)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    options = _options(threads)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return _session_of(_load(model.SerializeToString(), options, str(folder / MODEL)))


def _session_of(session: onnxruntime.InferenceSession) -> OnnxSession | EncoderSession:
    is_encoder = session.get_outputs()[0].name == HIDDEN
    return _encoder(session) if is_encoder else OnnxSession(session)


def _options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    return options


def _load(model: str | bytes, options: onnxruntime.SessionOptions, name: str) -> onnxruntime.InferenceSession:
    try:
        return onnxruntime.InferenceSession(model, options, providers=PROVIDERS)
    except Exception as error:  # the runtime's own exception types share no base
        raise ArtifactError(f"{name} does not load in onnxruntime {onnxruntime.__version__}: {error}") from None


def _stated(session: onnxruntime.InferenceSession, name: str) -> int:
    """The context, or an encoder's vocabulary, that the graph was written for."""
    text = session.get_modelmeta().custom_metadata_map.get(f"pocket.{name}", "")
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= LONGEST and len(text) < 9):
        raise ArtifactError(f"the graph's {name} is {text!r}; it must be a whole number from 1 to {LONGEST}")
    return int(text)
