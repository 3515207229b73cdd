"""Any model of transformers, run by transformers, with its matrices said in verbs. Imports transformers, alone here.

What a model does between its matrices is unknown, so it is one layer without a cache: it is never pruned by structure,
Gram matrices of all sites come from one pass over the unchanged model, and every step sees the whole text again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn

from exporter.adapters import Shapes, equal_layers
from exporter.adapters.config import Fields
from exporter.errors import ArchitectureError, BackendMissingError, CheckpointError, RecipeError, TargetError
from exporter.model import Architecture, Layer
from exporter.ops import AttentionSites, MlpSites, Ops

T = TypeVar("T")

EMBEDDING = HEAD = ""  # they differ from model to model: see `table`
WHOLE = Layer(1, 1, 1, 1, 1)  # the one layer, of widths that nobody knows
LONGEST = 2048  # tokens, where a config says nothing
MASKS = (".bias", ".masked_bias")
LOOKED_AT, SAME = 8, 1e-3  # tokens; relative, where the same operations run on the same numbers
DECODERS = ("ForCausalLM", "LMHeadModel")  # endings of the classes that give logits


def embed(ops: Ops[T], ids: T) -> T:
    """The ids themselves: they go into the one layer."""
    return ids


def block(ops: Ops[T], x: T, layer: int) -> T:
    """The whole model: token ids to logits, or to the last hidden state.

    Raises:
        TargetError: the verbs are of a runtime that does not run torch.
    """
    network = _network(_config(ops.model.architecture))
    if x is None:  # verbs that compute nothing, and listen
        return cast(T, network.say(ops))
    if not isinstance(x, Tensor):
        raise TargetError("a model that only transformers knows is torch code, which this target cannot take")
    return cast(T, network(cast(Ops[Tensor], ops), x))


def head(ops: Ops[T], x: T) -> T:
    """Nothing is left to do."""
    return x


def attention_sites(layer: int) -> AttentionSites:
    """Refused: nobody knows which matrices are attention's."""
    _refuse()


def mlp_sites(layer: int) -> MlpSites:
    """Refused: nobody knows which matrices are an MLP's."""
    _refuse()


def sites(architecture: Architecture) -> tuple[str, ...]:
    """Sites of the matrices that multiply, apart from tied ones, in the model's own order."""
    network = _network(_config(architecture))
    return tuple(site for site in network.linears if site not in network.tables)


def table(architecture: Architecture) -> str:
    """Site of the token embedding."""
    return _network(_config(architecture)).tokens


def shapes(architecture: Architecture) -> Shapes:
    """The matrices and vectors of such a model."""
    network = _network(_config(architecture))
    return Shapes(network.weights, network.vectors, {})


def stored(name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
    """A checkpoint's tensor as it is, looked at and not kept (see `tensors`); masks of old ones may be no floats."""
    return None if name.endswith(MASKS) and tensor.ndim != 1 else (name, tensor)


def tensors(architecture: Architecture, folder: Path) -> dict[str, Tensor]:
    """The parameters of a checkpoint, as transformers itself reads them: it knows the old names of every family.

    Raises:
        CheckpointError: the checkpoint lacks some, or has others.
    """
    transformers, network = _transformers(), _network(_config(architecture))
    transformers.utils.logging.disable_progress_bar()
    kind = transformers.AutoModelForCausalLM if architecture.causal else transformers.AutoModel
    try:
        module, told = kind.from_pretrained(
            folder, dtype="auto", use_safetensors=True, local_files_only=True, trust_remote_code=False,
            output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"transformers cannot read {folder}: {' '.join(str(error).split())[:200]}") from None
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if told.get(what):
            raise CheckpointError(
                f"{folder}: {what.replace('_keys', '')} tensors: {', '.join(sorted(map(str, told[what]))[:3])}"
            )
    found = network.parameters(module)
    _require_equal(network, module, found)
    return found


def read(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json describes, as transformers understands it.

    Raises:
        BackendMissingError: transformers is not installed.
        ArchitectureError: transformers does not know the model, or it has an encoder and a decoder, or is quantized.
    """
    fields = Fields(config)
    if fields.get("is_encoder_decoder") or fields.get("quantization_config"):
        raise ArchitectureError("config.json: a model of encoder and decoder, or one in codes, cannot be exported")
    text = json.dumps(dict(config), sort_keys=True)
    found, network = _understood(text), _network(text)
    return Architecture(
        family="generic",
        vocab=found.vocab_size,
        hidden=found.hidden_size,
        positions=getattr(found, "max_position_embeddings", None) or LONGEST,
        layers=equal_layers(1, WHOLE),
        activation="",
        norm_eps=1e-5,
        rope=None,
        tied=True,
        bos=next(iter(fields.tokens("bos_token_id")), None),
        eos=fields.tokens("eos_token_id"),
        causal=network.is_decoder,
        config=text,
    )


class _Network:
    """A transformers model without parameters, whose matrices are said in the verbs of whoever runs it.

    Args:
        text: config.json.

    Attributes:
        weights: Shape [out, in] by site.
        vectors: Length by full name, of norms and biases.
        linears, tables: Sites that multiply; sites in which rows are looked up.
        tokens: The one among them that tokens are looked up in.
    """

    def __init__(self, text: str) -> None:
        self.is_decoder, self._module = _empty(text)
        self.vocab: int = self._module.config.get_text_config().vocab_size
        self.ops: Ops[Tensor] | None = None
        self.weights: dict[str, tuple[int, int]] = {}
        self._turned: set[str] = set()
        self._sites: dict[int, str] = {}  # id of a parameter -> its site; tied ones share it
        self._kept: list[nn.Module] = []  # modules whose parameters' ids are keys
        self.linears, self.tables = self._said()
        own = self._module.get_input_embeddings()
        self.tokens = own.site if isinstance(own, _Looked) else ""
        plain = {name: tuple(parameter.shape) for name, parameter in self._module.named_parameters()}
        odd = [f"{name} {list(shape)}" for name, shape in plain.items() if len(shape) != 1]
        if odd:
            raise ArchitectureError(
                f"only plain matrices, tables and vectors can be exported, not {', '.join(odd[:3])}"
            )
        self._vectors = tuple(plain)
        self.vectors = {name: shape[0] for name, shape in plain.items()} | self._biases

    def __call__(self, ops: Ops[Tensor], ids: Tensor) -> Tensor:
        """Logits or hidden states: ids [batch, tokens] to [batch, tokens, outputs]."""
        self.ops = ops
        parameters = {name: ops.tensor(name) for name in self._vectors}  # type: ignore[attr-defined]
        try:
            found = torch.func.functional_call(self._module, parameters, (ids,))
        finally:
            self.ops = None
        result: Tensor = found.logits if self.is_decoder else found.last_hidden_state
        return result

    def say(self, ops: Ops[Any]) -> Any:
        """Every lookup and product once, for verbs that only listen."""
        for site in self.tables:
            ops.embedding(None, site)
        for site in self.linears:
            ops.linear(None, site)

    def parameters(self, module: nn.Module) -> dict[str, Tensor]:
        """The same network's own parameters, by the names that `shapes` gives; [in, out] ones are turned."""
        own = {name: parameter.detach() for name, parameter in module.named_parameters(remove_duplicate=False)}
        found = {name: own[name] for name in self.vectors}
        for site in self.weights:
            values = own[f"{site}.weight"]
            found[f"{site}.weight"] = values.t().contiguous() if site in self._turned else values
        return found

    def _said(self) -> tuple[list[str], list[str]]:
        """Put verbs in place of matrices; returns sites that multiply, and sites of lookups."""
        linears, tables, self._biases = list[str](), list[str](), dict[str, int]()
        modules = list(self._module.named_modules())
        for name, module in modules:  # lookups first: a tied head takes the embedding's site
            if type(module) is nn.Embedding:  # one of another kind does more than look rows up
                tables.append(self._site(name, module, is_turned=False))
                self._replace(name, _Looked(self, tables[-1]))
        for name, module in modules:
            is_turned = type(module).__name__ == "Conv1D"
            if type(module) is nn.Linear or is_turned:
                linears.append(self._site(name, module, is_turned))
                if module.bias is not None:
                    self._biases[f"{linears[-1]}.bias"] = len(cast(Tensor, module.bias))
                self._replace(name, _Multiplied(self, linears[-1]))
        return linears, tables

    def _site(self, name: str, module: nn.Module, is_turned: bool) -> str:
        weight = cast(Tensor, module.weight)
        self._kept.append(module)
        site = self._sites.setdefault(id(weight), name)
        if site == name:
            out, width = weight.shape
            self.weights[name] = (width, out) if is_turned else (out, width)
            self._turned |= {name} if is_turned else set()
        return site

    def _replace(self, name: str, module: nn.Module) -> None:
        parent, _, last = name.rpartition(".")
        setattr(self._module.get_submodule(parent), last, module)


class _Plain:
    """The three verbs that a network says, over a checkpoint's parameters."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters

    def linear(self, x: Tensor, site: str) -> Tensor:
        return nn.functional.linear(x, self._parameters[f"{site}.weight"], self._parameters.get(f"{site}.bias"))

    def embedding(self, ids: Tensor, site: str) -> Tensor:
        return nn.functional.embedding(ids, self._parameters[f"{site}.weight"])

    def tensor(self, name: str) -> Tensor:
        return self._parameters[name]


def _require_equal(network: _Network, module: Any, parameters: Mapping[str, Tensor]) -> None:
    """Hold the network to transformers' own model on one short text: a module may do what its type does not say.

    Raises:
        ArchitectureError: it says something else, or cannot be run.
    """
    ids = torch.arange(LOOKED_AT)[None] % network.vocab
    with torch.inference_mode():
        right = module.eval()(ids)
        try:
            found = network(cast(Ops[Tensor], _Plain(parameters)), ids)
        except (AttributeError, RuntimeError, TypeError) as error:
            raise ArchitectureError(f"transformers' code of this model looks into its matrices: {error}") from None
    right = right.logits if network.is_decoder else right.last_hidden_state
    if not bool((found - right).norm() <= SAME * right.norm()):
        raise ArchitectureError("transformers' code of this model does more than its matrices and norms say")


class _Multiplied(nn.Module):
    """A matrix and its bias, in the verbs of whoever runs the network."""

    def __init__(self, network: _Network, site: str) -> None:
        super().__init__()
        self.site = site
        self._network = [network]  # in a list, so that it is no part of the module

    def forward(self, x: Tensor) -> Tensor:
        ops = self._network[0].ops
        assert ops is not None  # only `_Network.__call__` runs this
        return ops.linear(x, self.site)


class _Looked(_Multiplied):
    """Rows of a matrix."""

    def forward(self, x: Tensor) -> Tensor:
        ops = self._network[0].ops
        assert ops is not None
        return ops.embedding(x, self.site)


@lru_cache(maxsize=2)
def _network(text: str) -> _Network:
    return _Network(text)


def _understood(text: str) -> Any:
    """The config as transformers has it."""
    transformers, config = _transformers(), dict(json.loads(text))
    kind = str(config.pop("model_type", None))
    config.pop("auto_map", None)  # code from a checkpoint is never run
    if kind not in transformers.CONFIG_MAPPING:
        raise ArchitectureError(f"no adapter for model type {kind!r}, and transformers does not know it either")
    try:
        found = transformers.AutoConfig.for_model(kind, **config)
        found.use_cache = False
        return found.get_text_config()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArchitectureError(f"config.json: transformers does not understand {kind!r}: {str(error)[:200]}") from None


def _empty(text: str) -> tuple[bool, Any]:
    """Whether a model gives logits, and the model, its parameters on the meta device."""
    transformers, config = _transformers(), _understood(text)
    names = config.architectures or [""]
    is_decoder = str(names[0]).endswith(DECODERS)
    kind = transformers.AutoModelForCausalLM if is_decoder else transformers.AutoModel
    try:
        with _without_numbers():
            module = kind.from_config(config).eval()
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ArchitectureError(f"config.json: transformers makes no model of it: {str(error)[:200]}") from None
    return is_decoder, module


@contextmanager
def _without_numbers() -> Iterator[None]:
    """Modules that are made here have parameters without numbers; buffers, such as rotary frequencies, have theirs."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is already is tied, and stays the same
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _config(architecture: Architecture) -> str:
    if architecture.config is None:
        raise ArchitectureError("a generic model has its config.json in its architecture; this one has none")
    return architecture.config


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise BackendMissingError("a model that no adapter knows", error.name, "generic") from None
    return transformers


def _refuse() -> NoReturn:
    raise RecipeError(
        "a model that only transformers knows cannot be pruned structurally, nor by parts of its layers: which of its "
        "matrices belong together is not known; quantize works on it"
    )
