"""Train the tiny Llama that ships in ``exporter/builtin/model``.

The text is the running interpreter's own standard library, so nothing is downloaded. Files are split by a
hash of their relative path: about one in twenty is held out and is seen neither by the tokenizer nor by the
model. The data order depends on the seed alone.

    OMP_NUM_THREADS=1 python scripts/train_builtin.py --steps 5000

A run writes the model folder and, beside it, ``calibration.txt``.
"""

from __future__ import annotations

import argparse
import bisect
import hashlib
import json
import math
import os
import random
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

BOS, EOS = "<s>", "</s>"
VOCAB = 2048
WINDOW = 256
HELD_OUT_PER_MILLE = 50
MODEL_DIR = Path(__file__).resolve().parent.parent / "exporter" / "builtin" / "model"

SKIPPED_FOLDERS = frozenset(
    (
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "lib2to3",
        "encodings",
        "pydoc_data",
        "__pycache__",
    )
)
SKIPPED_FILES = frozenset({"html/entities.py", "stringprep.py"})
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")

CALIBRATION_BYTES = 120_000
CALIBRATION_SHARE = 10_000
CALIBRATION_FILES = (
    "argparse.py",
    "asyncio/tasks.py",
    "bisect.py",
    "calendar.py",
    "collections/__init__.py",
    "configparser.py",
    "contextlib.py",
    "copy.py",
    "csv.py",
    "dataclasses.py",
    "functools.py",
    "json/decoder.py",
    "pathlib.py",
)
CALIBRATION_HEADER = (
    "# Excerpts of the Python standard library (copyright Python Software Foundation), PSF-2.0 licence.\n"
)

Texts = dict[str, str]


class Split(NamedTuple):
    """The standard library's files by relative path, in two disjoint parts."""

    train: Texts
    held_out: Texts


class Plan(NamedTuple):
    """What one run is told."""

    out: Path
    steps: int
    batch: int
    peak: float
    warm_up: int
    seed: int
    save_every: float


def is_wanted(path: str) -> bool:
    """Tell whether a relative path is hand-written library code (no tests, no generated tables)."""
    parts = path.split("/")
    skipped = path in SKIPPED_FILES or not SKIPPED_FOLDERS.isdisjoint(parts)
    return not skipped and not any(part.startswith(SKIPPED_PREFIXES) for part in parts)


def is_held_out(path: str) -> bool:
    """Tell whether a relative path belongs to the held-out part."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") % 1000 < HELD_OUT_PER_MILLE


def read_texts(root: Path) -> Iterator[tuple[str, str]]:
    """Yield relative path and text of every wanted UTF-8 file below ``root``, sorted by path."""
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    for path in filter(is_wanted, paths):
        try:
            text = (root / path).read_bytes().decode().replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield path, text


def load_split() -> Split:
    """Read the running interpreter's standard library and split it by file."""
    split = Split({}, {})
    for path, text in read_texts(Path(sysconfig.get_paths()["stdlib"])):
        (split.held_out if is_held_out(path) else split.train)[path] = text
    return split


def train_tokenizer(texts: Texts) -> Tokenizer:
    """Train a byte-level BPE whose post-processor puts BOS first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts.values(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": 512,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def save_calibration(train: Texts, out: Path) -> None:
    """Write excerpts of training files, cut at line ends, up to about 120 kB."""
    pieces = [CALIBRATION_HEADER]
    for path in CALIBRATION_FILES:
        text = train.get(path, "")[:CALIBRATION_SHARE]
        if text and sum(map(len, pieces)) < CALIBRATION_BYTES:
            pieces.append(text[: text.rfind("\n") + 1])
    out.write_text("".join(pieces), encoding="utf-8")


def to_stream(tokenizer: Tokenizer, texts: Texts) -> torch.Tensor:
    """Return all texts as one row of ids, each text followed by EOS."""
    eos = tokenizer.token_to_id(EOS)
    encodings = tokenizer.encode_batch(list(texts.values()), add_special_tokens=False)
    return torch.tensor([token for encoding in encodings for token in [*encoding.ids, eos]])


def line_starts(tokenizer: Tokenizer, stream: torch.Tensor) -> list[int]:
    """Return every place of the stream that begins a text or follows a newline token."""
    newlines = {index for token, index in tokenizer.get_vocab().items() if token.endswith("Ċ")}
    breaks = torch.tensor(sorted(newlines | {tokenizer.token_to_id(EOS)}))
    after = (torch.isin(stream, breaks).nonzero().flatten() + 1).tolist()
    return [0, *(start for start in after if start <= len(stream) - WINDOW + 1)]


def epoch_starts(lines: list[int], length: int, rng: random.Random) -> list[int]:
    """Return the shuffled starts of one pass: a window apart, moved on to a line start where one is near."""
    starts: list[int] = []
    wanted = rng.randrange(WINDOW)
    while wanted <= length - WINDOW + 1:
        place = bisect.bisect_left(lines, wanted)
        near = place < len(lines) and lines[place] - wanted <= WINDOW // 4
        starts.append(lines[place] if near else wanted)
        wanted = starts[-1] + WINDOW - 1
    rng.shuffle(starts)
    return starts


def endless_starts(lines: list[int], length: int, seed: int) -> Iterator[int]:
    """Yield window starts, pass after pass."""
    rng = random.Random(seed)
    while True:
        yield from epoch_starts(lines, length, rng)


def take_windows(stream: torch.Tensor, starts: list[int], bos: int) -> torch.Tensor:
    """Cut one window per start; BOS comes first in each."""
    rows = stream[torch.tensor(starts)[:, None] + torch.arange(WINDOW - 1)]
    return torch.cat([torch.full((len(starts), 1), bos), rows], dim=1)


def build_config(tokenizer: Tokenizer) -> LlamaConfig:
    """Return the architecture of the built-in model."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
    )


def rate_at(step: int, plan: Plan) -> float:
    """Return the learning rate: linear warm-up, then a cosine down to a hundredth of the peak."""
    if step < plan.warm_up:
        return plan.peak * (step + 1) / plan.warm_up
    done = (step - plan.warm_up) / max(1, plan.steps - plan.warm_up)
    return plan.peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def build_optimizer(model: PreTrainedModel) -> torch.optim.AdamW:
    """Return AdamW that decays matrices only."""
    weights = list(model.parameters())
    groups = [
        {"params": [weight for weight in weights if weight.dim() > 1], "weight_decay": 0.1},
        {"params": [weight for weight in weights if weight.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def window_loss(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of every token after BOS."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def train_step(
    model: PreTrainedModel,
    optimizer: torch.optim.AdamW,
    windows: torch.Tensor,
    rate: float,
) -> float:
    """Do one update (bfloat16 matrix products, float32 weights) and return its loss."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = window_loss(model, windows)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def save_model(model: PreTrainedModel, out: Path) -> None:
    """Write the weights rounded to bfloat16, and both configs."""
    rounded = type(model)(model.config).bfloat16()
    rounded.load_state_dict(model.state_dict())
    rounded.config.dtype = torch.bfloat16
    ends = {"bos_token_id": model.config.bos_token_id, "eos_token_id": model.config.eos_token_id}
    rounded.generation_config = GenerationConfig.from_dict({**ends, "do_sample": False})
    rounded.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)


def measure(out: Path, held_out: Texts) -> float:
    """Return the saved model's perplexity per token on held-out text, in windows that do not overlap."""
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    stream = to_stream(tokenizer, held_out)
    starts = list(range(0, len(stream) - WINDOW + 2, WINDOW - 1))
    total = 0.0
    with torch.no_grad():
        for first in range(0, len(starts), 16):
            windows = take_windows(stream, starts[first : first + 16], model.config.bos_token_id)
            total += window_loss(model, windows).item() * len(windows)
    return math.exp(total / len(starts))


def report(step: int, loss: float, began: float, plan: Plan) -> None:
    """Print one progress line."""
    spent = time.monotonic() - began
    left = spent / step * (plan.steps - step)
    line = f"step {step}/{plan.steps} loss {loss:.4f} rate {rate_at(step, plan):.2e}"
    print(f"{line} spent {spent / 60:.1f} min left {left / 60:.1f} min", flush=True)


def fit(model: PreTrainedModel, stream: torch.Tensor, starts: Iterator[int], plan: Plan) -> None:
    """Train for the planned steps, saving now and then."""
    optimizer, began, smooth = build_optimizer(model), time.monotonic(), 0.0
    saved = began
    for step in range(plan.steps):
        windows = take_windows(stream, [next(starts) for _ in range(plan.batch)], model.config.bos_token_id)
        loss = train_step(model, optimizer, windows, rate_at(step, plan))
        smooth = loss if step == 0 else 0.98 * smooth + 0.02 * loss
        if (step + 1) % 50 == 0:
            report(step + 1, smooth, began, plan)
        if time.monotonic() - saved > plan.save_every * 60:
            save_model(model, plan.out)
            saved = time.monotonic()


def steps_within(minutes: float, config: LlamaConfig, batch: int) -> int:
    """Time twenty steps of a throw-away model and return how many fit in ``minutes``."""
    model = LlamaForCausalLM(config)
    optimizer = build_optimizer(model)
    windows = torch.randint(2, VOCAB, (batch, WINDOW))
    train_step(model, optimizer, windows, 0.0)
    began = time.monotonic()
    for _ in range(20):
        train_step(model, optimizer, windows, 0.0)
    return max(1, int(minutes * 60 * 20 / (time.monotonic() - began)))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the built-in model on the standard library.")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=5000, help="number of updates (reproducible)")
    length.add_argument("--minutes", type=float, help="as many updates as fit, by a short timing")
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="model folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16, help="windows in one update")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--warm-up", type=int, default=150, help="updates of linear warm-up")
    parser.add_argument("--save-every", type=float, default=8.0, help="minutes between two saves")
    return parser.parse_args()


def make_plan(options: argparse.Namespace, config: LlamaConfig) -> Plan:
    """Settle the number of steps and gather the rest."""
    steps = steps_within(options.minutes, config, options.batch) if options.minutes else options.steps
    return Plan(
        out=options.out,
        steps=steps,
        batch=options.batch,
        peak=options.rate,
        warm_up=options.warm_up,
        seed=options.seed,
        save_every=options.save_every,
    )


def print_data(split: Split, stream: torch.Tensor) -> None:
    """Print the size of both parts."""
    for name, texts in split._asdict().items():
        print(f"{name}: {len(texts)} files, {sum(len(text.encode()) for text in texts.values())} bytes")
    print(f"train tokens: {len(stream)}", flush=True)


def prepare(out: Path) -> tuple[Split, Tokenizer]:
    """Split the text and write the tokenizer and the calibration text."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    split = load_split()
    tokenizer = train_tokenizer(split.train)
    save_tokenizer(tokenizer, out)
    save_calibration(split.train, out.parent / "calibration.txt")
    return split, tokenizer


def train(model: PreTrainedModel, tokenizer: Tokenizer, stream: torch.Tensor, plan: Plan) -> None:
    """Train a fresh model and save it."""
    print(f"parameters: {model.num_parameters()}", flush=True)
    starts = endless_starts(line_starts(tokenizer, stream), len(stream), plan.seed)
    fit(model, stream, starts, plan)
    save_model(model, plan.out)


def main() -> None:
    """Train, save, reload and measure."""
    options = parse_arguments()
    split, tokenizer = prepare(options.out)
    stream = to_stream(tokenizer, split.train)
    print_data(split, stream)
    plan = make_plan(options, build_config(tokenizer))
    torch.manual_seed(plan.seed)
    train(LlamaForCausalLM(build_config(tokenizer)), tokenizer, stream, plan)
    perplexity = measure(options.out, split.held_out)
    print(f"held-out perplexity {perplexity:.3f}, {VOCAB / perplexity:.1f} times under uniform")


if __name__ == "__main__":
    main()
