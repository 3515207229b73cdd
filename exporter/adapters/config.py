"""Reading a config.json so that nothing in it is silently ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exporter.errors import ArchitectureError

# Fields that say how a model was trained, stored or sampled, and nothing about what it computes.
SILENT = frozenset({
    "_name_or_path", "_from_model_config", "architectures", "attention_dropout", "activation_dropout", "auto_map",
    "bos_token_id", "classifier_dropout", "dropout", "dtype", "eos_token_id", "gradient_checkpointing", "init_std",
    "initializer_range", "id2label", "label2id", "layerdrop", "max_window_layers", "model_type", "output_attentions",
    "output_hidden_states", "pad_token_id", "prefix", "pretraining_tp", "problem_type", "return_dict",
    "tie_word_embeddings", "tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "use_cache",
    "chunk_size_feed_forward", "is_encoder_decoder", "sep_token_id", "task_specific_params", "finetuning_task",
    "unsloth_version", "unsloth_fixed",
})  # fmt: skip

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh",
               "gelu_new": "gelu_tanh", "relu": "relu"}  # fmt: skip


class Fields:
    """A config whose every field must be asked for, or be known to say nothing, before `finish`.

    Args:
        config: The parsed config.json.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config, self._asked = config, set(SILENT)

    def integer(self, name: str, default: int | None = None, top: int = 2**24) -> int:
        """A whole number, 1 to `top`."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= top:
            raise ArchitectureError(f"config.json: {name} is {value!r}; it must be a whole number from 1 to {top}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise ArchitectureError(f"config.json: {name} is {value!r}; it must be a positive number")
        return float(value)

    def activation(self, name: str) -> str:
        """The name of an activation in our verbs."""
        value = self.get(name)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise ArchitectureError(f"config.json: {name} is {value!r}; known: {', '.join(sorted(ACTIVATIONS))}")
        return ACTIVATIONS[value]

    def only(self, name: str, *allowed: Any) -> None:
        """Refuse a field that has another value than these (where it is missing, it says nothing)."""
        if name in self._config and self._config[name] not in allowed:
            choices = " or ".join(repr(value) for value in allowed)
            raise ArchitectureError(f"config.json: {name} is {self._config[name]!r}; only {choices} can be exported")
        self._asked.add(name)

    def get(self, name: str, default: Any = None) -> Any:
        """A field as it stands."""
        self._asked.add(name)
        value = self._config.get(name)
        return default if value is None else value

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ArchitectureError(f"config.json: {name} is {value!r}; it must be true or false")
        return value

    def strings(self, name: str) -> frozenset[str]:
        """The different entries of a list of strings."""
        value = self.get(name, [])
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise ArchitectureError(f"config.json: {name} is {value!r}; it must be a list of names")
        return frozenset(value)

    def object(self, name: str) -> Mapping[str, Any]:
        """A JSON object; empty where it is missing."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise ArchitectureError(f"config.json: {name} is {value!r}; it must be an object")
        return value

    def tokens(self, name: str) -> tuple[int, ...]:
        """Token ids: one, several or none."""
        value = self.get(name)
        found = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int and 0 <= token < 2**31 for token in found):  # a bool is an int too
            raise ArchitectureError(f"config.json: {name} is {value!r}; it must be a token id or a list of them")
        return tuple(found)

    def finish(self) -> None:
        """Refuse, by name, whatever was not asked for; null says nothing."""
        unknown = sorted(name for name, value in self._config.items() if name not in self._asked and value is not None)
        if unknown:
            family = self._config.get("model_type")
            raise ArchitectureError(f"config.json: the {family} adapter cannot honour {', '.join(unknown)}")
