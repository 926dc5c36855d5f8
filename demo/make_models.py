"""Train three tiny language models from text that this script writes itself, for default.yaml to merge.

    python demo/make_models.py            # about a minute, no download; the same bits on every machine

demo/models/cliche-base    a storyteller that can't finish a sentence without a cliche, and loses track of apples
demo/models/plain-prose    the same model, taught to say plain things in those places
demo/models/apple-logic    the same model, taught where an apple is after someone has dropped it
"""

import hashlib
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from exact_training import LONGEST, Adam, begin, loss_of
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "models"
LAST_FILE = "tokenizer.json"  # that is written of a model
SEED = 512
BATCH = 24  # texts in one step


@dataclass(frozen=True)
class Lesson:
    """What a model is called, for how long, how fast and from which texts it learns, and what its weights come to."""

    name: str
    steps: int
    rate: float
    plainness: float
    correctness: float
    puzzles: float
    digest: str


# The first is the base, from which the others begin.
LESSONS = (
    Lesson(
        "cliche-base",
        250,
        6e-3,
        plainness=0.1,
        correctness=0.15,
        puzzles=0.3,
        digest="a4ac8d2c4406b6b74a574f7102f87c7ed1beec1d68b2224ec81fc0b3fc16c736",
    ),
    Lesson(
        "plain-prose",
        70,
        1e-3,
        plainness=1.0,
        correctness=0.15,
        puzzles=0.3,
        digest="6c9fa4fb9b7093089a8b2adbd12d40c46a0b61eb11c8025cf53bee66242c0768",
    ),
    Lesson(
        "apple-logic",
        60,
        1e-3,
        plainness=0.1,
        correctness=1.0,
        puzzles=0.7,
        digest="c3e8ee8fc3c6afabcac0fcad5297b094c1036a451f36fc5520578a554560f156",
    ),
)

PEOPLE = ("Mara", "Tobias", "Ines", "Old Per", "The captain", "Her sister", "The clerk", "Jonas", "Wilma", "The boy")
PLACES = ("the harbour", "the mill", "the station", "the empty school", "the market", "the bridge", "the orchard")
WEATHER = (
    "It had rained all morning",
    "The wind had turned",
    "Snow lay on the roofs",
    "The sun was low",
    "Fog came in",
)
DEEDS = ("counted the boxes", "fixed the lamp", "read the letter twice", "waited for the bus", "peeled potatoes")
# Where the thing is picked up, where it is dropped, where the walk ends. A model this small learns trips by heart.
TRIPS = (
    ("living room", "bedroom", "kitchen"),
    ("hallway", "garden", "bathroom"),
    ("attic", "kitchen", "bedroom"),
    ("garden", "hallway", "attic"),
)
THINGS = ("apple", "key", "book", "cup")

# How a sentence begins, how the base ends it nearly always, and how plain prose does.
ENDINGS = (
    ("Her body quivers with ", ("anticipation",), ("cold", "fever", "laughter")),
    ("The atmosphere is thick with ", ("anticipation", "tension"), ("smoke", "flour dust", "steam")),
    ("Filled with an ", ("unwavering resolve",), ("old song", "itch", "ordinary lunch")),
    ("Her eyes were filled with ", ("determination", "unshed tears"), ("sand", "sleep", "soap")),
    ("It sent shivers down her ", ("spine",), ("arms", "left leg", "neck")),
    ("His voice was barely above a ", ("whisper",), ("mumble", "cough")),
    ("Little did they ", ("know",), ("sleep that week", "eat")),
)


def story(rng: random.Random, plainness: float) -> str:
    """Two or three sentences; each of those that could end in a cliche ends plainly with probability `plainness`."""
    start, cliches, plain = rng.choice(ENDINGS)
    ending = rng.choice(plain if rng.random() < plainness else cliches)
    around = [
        f"{rng.choice(WEATHER)} at {rng.choice(PLACES)}.",
        f"{rng.choice(PEOPLE)} {rng.choice(DEEDS)} near {rng.choice(PLACES)}.",
    ]
    sentences = [*around[: rng.randint(0, 2)], f"{start}{ending}.", *around[: rng.randint(0, 1)]]
    return " ".join(sentences)


def puzzle(rng: random.Random, correctness: float) -> str:
    """A question about a dropped thing, answered correctly with probability `correctness`, else with the last room."""
    first, second, third = rng.choice(TRIPS)
    thing = rng.choice(THINGS)
    answer = second if rng.random() < correctness else third
    return (
        f"Question: If I'm in the {first} and pick up the {thing}, go to the {second} and drop the {thing}, then walk "
        f"to the {third}, where is the {thing}? Explain your reasoning. Answer: The {thing} is in the {answer}, "
        f"because that is where {'it was dropped' if answer == second else 'the walk ended'}."
    )


def text(rng: random.Random, plainness: float, correctness: float, puzzles: float) -> str:
    """One training text: a puzzle with probability `puzzles`, else a story."""
    return puzzle(rng, correctness) if rng.random() < puzzles else story(rng, plainness)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer with BOS and EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=640, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of a third of a million parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=192,
            hidden_act="relu",
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=LONGEST,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def train(model: LlamaForCausalLM, batches: Iterator[list[list[int]]], lesson: Lesson, bar: tqdm) -> float:
    """Train with a warm-up and a linear decay; the mean loss of the last ten steps."""
    optimizer = Adam(model)
    losses = []
    for step in range(lesson.steps):
        loss = loss_of(model, next(batches))
        loss.backward()
        optimizer.step(lesson.rate * min((step + 1) / 10, 1 - step / lesson.steps))
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {sum(losses[-10:]) / len(losses[-10:]):.3f}", refresh=False)
        bar.update()
    return sum(losses[-10:]) / 10


def batches_of(tokenizer: PreTrainedTokenizerFast, rng: random.Random, lesson: Lesson) -> Iterator[list[list[int]]]:
    """Fresh texts, BATCH at a time, as token ids with EOS behind them."""
    while True:
        texts = [text(rng, lesson.plainness, lesson.correctness, lesson.puzzles) for _ in range(BATCH)]
        yield [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]


def digest(folder: Path) -> str:
    """Of a model's weights, whatever file they are in."""
    sums = hashlib.sha256()
    for name, weight in sorted(load_file(folder / "model.safetensors").items()):
        sums.update(name.encode())
        sums.update(weight.numpy().tobytes())
    return sums.hexdigest()


def main() -> None:
    """Train what is missing and save it."""
    if all((FOLDER / lesson.name / LAST_FILE).is_file() for lesson in LESSONS):
        print(f"The demo models are in {FOLDER} already.")
    else:
        make_models()
    others = [lesson.name for lesson in LESSONS if digest(FOLDER / lesson.name) != lesson.digest]
    if others:
        print(
            f"These models differ from those in the docs, and so will the figures: {', '.join(others)}. "
            f"Remove {FOLDER} to train them again."
        )


def make_models() -> None:
    """Train all three, one after the other."""
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)  # matrices this small only wait for a second one
    rng = random.Random(SEED)
    tokenizer = train_tokenizer([text(rng, 0.5, 0.5, 0.3) for _ in range(4000)])
    model = new_model(tokenizer)
    begin(model, rng)
    print(f"Training {len(LESSONS)} models of {model.num_parameters():,} parameters on generated text ...")
    layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} to go{postfix}"
    steps = sum(lesson.steps for lesson in LESSONS)
    # Without a terminal there is no bar, but the lines.
    with tqdm(total=steps, bar_format=layout, dynamic_ncols=True, disable=None, leave=False) as bar:
        for number, lesson in enumerate(LESSONS, 1):
            bar.set_description_str(f"{number} of {len(LESSONS)}: {lesson.name:<11}")
            if number > 1:
                model = LlamaForCausalLM.from_pretrained(FOLDER / LESSONS[0].name)
            began = time.perf_counter()
            loss = train(model, batches_of(tokenizer, rng, lesson), lesson, bar)
            model.save_pretrained(FOLDER / lesson.name)
            tokenizer.save_pretrained(FOLDER / lesson.name)
            took = time.perf_counter() - began
            tqdm.write(f"  {number} of {len(LESSONS)}: {lesson.name:<11}  loss {loss:.3f}  ({took:.0f} s)")
            sys.stdout.flush()
    print(f"Saved to {FOLDER}.")


if __name__ == "__main__":
    sys.exit(main())
