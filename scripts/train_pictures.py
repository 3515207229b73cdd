"""Train the multimodal reference model of docs/results.md: a LLaVA of 1.4 M parameters that is asked about shapes.

A CLIP vision tower, a projector and a Llama, by the classes of transformers. Pictures and questions are drawn from a
seed (see ``pictures.py``); test pictures come from a part of the seeds that training never draws. Weights stay out of
the repository; this builds them again, in under an hour on one core.

    OMP_NUM_THREADS=1 python scripts/train_pictures.py --out reference/pictures

A run writes ``calibration/`` and ``test/`` beside the model's own files: pictures as PNG, and lines that name them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pictures
import torch
import train_builtin as training
from pictures import Question, Scene
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

BOS, EOS, IMAGE = training.BOS, training.EOS, "<image>"
VOCAB, IGNORED = 384, -100
CAPTION = "what is there?"
PATCH = 16
LESSONS = 5  # the first of so many parts of the training is captions alone
IMAGE_TOKENS = (pictures.SIZE // PATCH) ** 2
MEAN = STD = 0.5


Lines = list[tuple[str, str]]  # what is asked, and what is answered


class Batch(NamedTuple):
    """Windows [count, length], pixels [count, 3, SIZE, SIZE], and labels that leave out pictures and questions."""

    ids: torch.Tensor
    pixels: torch.Tensor
    labels: torch.Tensor


def captions_of(scene: Scene) -> Lines:
    """What to ask for everything that stands in a picture, and what to answer."""
    return [(CAPTION, pictures.caption(scene.things))]


def questions_of(scene: Scene) -> Lines:
    """The questions of a picture and their answers."""
    return [(question.text, question.answer) for question in scene.questions]


def one_question_of(scene: Scene) -> Lines:
    """The first of its questions, which come in random order."""
    return questions_of(scene)[:1]


def text_of(scene: Scene) -> str:
    """The picture's place, and its questions with their answers."""
    return f"{IMAGE}\n" + "".join(f"{asked} {answer}\n" for asked, answer in questions_of(scene))


def train_tokenizer(seed: int) -> Tokenizer:
    """Train a byte-level BPE on the text of training pictures."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, EOS, IMAGE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    scenes = (pictures.scene(seed, pictures.TRAIN, index) for index in range(2000))
    said = (line for scene in scenes for line in questions_of(scene) + captions_of(scene))
    tokenizer.train_from_iterator((f"{asked} {answer}\n" for asked, answer in said), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, lines: Lines) -> tuple[list[int], list[int]]:
    """Tokens of a picture and what is said of it, and their labels."""
    bos, eos, image = (tokenizer.token_to_id(token) for token in (BOS, EOS, IMAGE))
    ids = [bos, *[image] * IMAGE_TOKENS, *tokenizer.encode("\n").ids]
    labels = [IGNORED] * len(ids)
    for asked, answer in lines:
        whole = tokenizer.encode(f"{asked} {answer}\n").ids
        known = len(tokenizer.encode(asked).ids)
        ids += whole
        labels += [IGNORED] * known + whole[known:]
    return [*ids, eos], [*labels, eos]


def batch_of(tokenizer: Tokenizer, scenes: list[Scene], said: Callable[[Scene], Lines]) -> Batch:
    """One batch of pictures and what is said of them; what is shorter than the longest is filled with EOS."""
    eos = tokenizer.token_to_id(EOS)
    rows = [encode(tokenizer, said(scene)) for scene in scenes]
    length = max(len(tokens) for tokens, _ in rows)
    ids = [tokens + [eos] * (length - len(tokens)) for tokens, _ in rows]
    labels = [marks + [IGNORED] * (length - len(marks)) for _, marks in rows]
    return Batch(torch.tensor(ids), pixels_of(scenes), torch.tensor(labels))


def pixels_of(scenes: list[Scene]) -> torch.Tensor:
    """[count, 3, SIZE, SIZE], float32, about -1 to 1."""
    bytes_ = torch.from_numpy(np.stack([scene.pixels for scene in scenes]))
    return (bytes_.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def build(tokenizer: Tokenizer) -> LlavaForConditionalGeneration:
    """A fresh model; the last layer of the vision tower is never read, as in LLaVA 1.5."""
    bos, eos, image = (tokenizer.token_to_id(token) for token in (BOS, EOS, IMAGE))
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=pictures.SIZE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=bos,
        eos_token_id=eos,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
    )
    return LlavaForConditionalGeneration(config)


def loss_of(model: LlavaForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """Mean loss of captions and answers."""
    logits = model(input_ids=batch.ids, pixel_values=batch.pixels, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten(), ignore_index=IGNORED
    )


def train_step(model: LlavaForConditionalGeneration, optimizer: torch.optim.AdamW, batch: Batch, rate: float) -> float:
    """Do one update and return its loss; matrices this small gain nothing from bfloat16."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = loss_of(model, batch)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def lesson(step: int, plan: training.Plan) -> Callable[[Scene], Lines]:
    """Captions first, as LLaVA does; then in turns captions, all questions of a picture, and twice a question alone."""
    turns = (captions_of, questions_of, one_question_of, one_question_of)
    return captions_of if step < plan.steps // LESSONS else turns[step % len(turns)]


def fit(model: LlavaForConditionalGeneration, tokenizer: Tokenizer, plan: training.Plan) -> None:
    """Train for the planned steps on pictures that are never drawn twice."""
    optimizer, began, smooth = training.build_optimizer(model), time.monotonic(), 0.0
    for step in range(plan.steps):
        first = step * plan.batch
        scenes = [pictures.scene(plan.seed, pictures.TRAIN, first + place) for place in range(plan.batch)]
        batch = batch_of(tokenizer, scenes, lesson(step, plan))
        loss = train_step(model, optimizer, batch, training.rate_at(step, plan))
        smooth = loss if step == 0 else 0.98 * smooth + 0.02 * loss
        if (step + 1) % 50 == 0:
            training.report(step + 1, smooth, began, plan)
        if (step + 1) % 500 == 0:
            save(model, tokenizer, plan.out)
            measure(plan.out, plan.seed, 100)


def save(model: LlavaForConditionalGeneration, tokenizer: Tokenizer, out: Path) -> None:
    """Write the weights rounded to bfloat16, the configs, the tokenizer, and how pixels are scaled."""
    training.save_tokenizer(tokenizer, out)
    rounded = LlavaForConditionalGeneration(model.config).bfloat16()
    rounded.load_state_dict(model.state_dict())
    rounded.config.dtype = torch.bfloat16
    ends = {name: getattr(model.config.text_config, name) for name in ("bos_token_id", "eos_token_id")}
    rounded.generation_config = GenerationConfig.from_dict({**ends, "do_sample": False})
    rounded.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    size = {"height": pictures.SIZE, "width": pictures.SIZE}
    scaling = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": pictures.SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
        "do_convert_rgb": True,
    }
    (out / "preprocessor_config.json").write_text(json.dumps(scaling, indent=2) + "\n")


def write_set(folder: Path, scenes: list[Scene], entries: list[tuple[int, dict[str, str]]]) -> None:
    """Write pictures as PNG, and a JSON line an entry, which names its picture."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(scenes):
        Image.fromarray(scene.pixels).save(folder / f"{index:04}.png")
    lines = [json.dumps({"image": f"{index:04}.png", **entry}) for index, entry in entries]
    (folder / f"{folder.name}.jsonl").write_text("\n".join(lines) + "\n")


def write_sets(out: Path, seed: int) -> None:
    """Write 256 pictures to calibrate with and 400 to test with; each has all its questions."""
    shown = [pictures.scene(seed, pictures.CALIBRATION, index) for index in range(256)]
    write_set(out / "calibration", shown, [(i, {"text": text_of(scene)}) for i, scene in enumerate(shown)])
    tested = [pictures.scene(seed, pictures.TEST, index) for index in range(400)]
    asked = [
        (index, {"question": f"{IMAGE}\n{question.text}", "answer": question.answer, "kind": question.kind})
        for index, scene in enumerate(tested)
        for question in scene.questions
    ]
    write_set(out / "test", tested, asked)


def answer_all(
    model: LlavaForConditionalGeneration, tokenizer: Tokenizer, asked: list[tuple[Scene, Question]]
) -> list[str]:
    """Greedy answers to questions of one length in tokens."""
    bos, image = tokenizer.token_to_id(BOS), tokenizer.token_to_id(IMAGE)
    prompts = [[bos, *[image] * IMAGE_TOKENS, *tokenizer.encode(f"\n{q.text}").ids] for _, q in asked]
    given = model.generate(
        input_ids=torch.tensor(prompts),
        attention_mask=torch.ones(len(prompts), len(prompts[0]), dtype=torch.int64),
        pixel_values=pixels_of([scene for scene, _ in asked]),
        max_new_tokens=4,
        pad_token_id=tokenizer.token_to_id(EOS),
    )
    return [text.split("\n")[0].strip() for text in tokenizer.decode_batch(given[:, len(prompts[0]) :].tolist())]


def measure(out: Path, seed: int, count: int) -> float:
    """Print and return the saved model's share of right answers on test pictures, beside what no picture gives.

    The baseline says the likeliest answer to each kind of question, counted on training pictures.
    """
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    model = LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    by_length = defaultdict(list)
    for scene in (pictures.scene(seed, pictures.TEST, index) for index in range(count)):
        for question in scene.questions:
            by_length[len(tokenizer.encode(question.text).ids)].append((scene, question))
    right: Counter[str] = Counter()
    for asked in by_length.values():
        answers = answer_all(model, tokenizer, asked)
        right.update(q.kind for (_, q), answer in zip(asked, answers, strict=True) if answer == q.answer)
    totals = Counter(question.kind for asked in by_length.values() for _, question in asked)
    for kind, total in sorted(totals.items()):
        print(f"  {kind}: {right[kind]} of {total}")
    share, blind = right.total() / totals.total(), baseline(seed, [q for asked in by_length.values() for _, q in asked])
    counts = f"{right.total()} of {totals.total()}"
    print(f"right answers {counts} ({share:.1%}); without the picture {blind:.1%}", flush=True)
    return share


def baseline(seed: int, questions: list[Question]) -> float:
    """Share of right answers of the likeliest answer to each question as it is worded, counted on training pictures."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for scene in (pictures.scene(seed, pictures.TRAIN, index) for index in range(5000)):
        for question in scene.questions:
            counts[question.text][question.answer] += 1
    return sum(counts[q.text].most_common(1)[0][0] == q.answer for q in questions) / len(questions)


def main() -> None:
    """Train, save, reload and measure."""
    parser = argparse.ArgumentParser(description="Train the multimodal reference model on drawn pictures.")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--steps", type=int, default=2000, help="number of updates")
    parser.add_argument("--batch", type=int, default=64, help="pictures in one update")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    training.logging.disable_progress_bar()
    plan = training.Plan(options.out, options.steps, options.batch, options.rate, 200, options.seed, 8.0)
    tokenizer = train_tokenizer(plan.seed)
    write_sets(plan.out, plan.seed)
    torch.manual_seed(plan.seed)
    model = build(tokenizer)
    print(f"parameters: {model.num_parameters()}", flush=True)
    fit(model, tokenizer, plan)
    save(model, tokenizer, plan.out)
    measure(plan.out, plan.seed, 400)


if __name__ == "__main__":
    main()
