"""Train three tiny language models from text that this script writes itself, for default.yaml to merge.

    python demo/make_models.py            # about a minute on two processor cores, no download

demo/models/cliche-base    a storyteller that can't finish a sentence without a cliche, and loses track of apples
demo/models/plain-prose    the same model, taught to say plain things in those places
demo/models/apple-logic    the same model, taught where an apple is after someone has dropped it
"""

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "models"
NAMES = ("cliche-base", "plain-prose", "apple-logic")
SEED = 512
BATCH = 32  # texts in one step

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
    """An untrained Llama of half a million parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=3,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def train(model: LlamaForCausalLM, rows: Callable[[], Tensor], steps: int, peak_rate: float) -> float:
    """Train on `steps` batches with a warm-up and a linear decay; the mean loss of the last ten."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 10, 1 - step / steps))
    losses = []
    model.train()
    for _ in range(steps):
        batch = rows()
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


def row_maker(tokenizer: PreTrainedTokenizerFast, rng: random.Random, **mixture: float) -> Callable[[], Tensor]:
    """A function that writes a fresh batch of texts, (BATCH, longest) token ids, the shorter ones filled with EOS."""

    def rows() -> Tensor:
        texts = tokenizer([text(rng, **mixture) for _ in range(BATCH)])["input_ids"]
        longest = max(len(tokens) for tokens in texts) + 1
        return torch.tensor([tokens + [tokenizer.eos_token_id] * (longest - len(tokens)) for tokens in texts])

    return rows


def main() -> None:
    """Train what is missing and save it."""
    if all((FOLDER / name / "config.json").is_file() for name in NAMES):
        print(f"The demo models are in {FOLDER} already.")
        return
    transformers.logging.disable_progress_bar()
    began = time.perf_counter()
    rng = random.Random(SEED)
    torch.manual_seed(SEED)
    base_text = {"plainness": 0.1, "correctness": 0.15, "puzzles": 0.3}
    tokenizer = train_tokenizer([text(rng, 0.5, 0.5, 0.3) for _ in range(4000)])
    model = new_model(tokenizer)
    trained = model.num_parameters()
    print(f"Training three models of {trained:,} parameters on text written on the spot ...")
    for name, steps, rate, mixture in (
        ("cliche-base", 300, 4e-3, base_text),
        ("plain-prose", 80, 1e-3, {**base_text, "plainness": 1.0}),
        ("apple-logic", 80, 1e-3, {**base_text, "correctness": 1.0, "puzzles": 0.7}),
    ):
        if name != "cliche-base":
            model = LlamaForCausalLM.from_pretrained(FOLDER / "cliche-base")
        loss = train(model, row_maker(tokenizer, rng, **mixture), steps, rate)
        model.save_pretrained(FOLDER / name)
        tokenizer.save_pretrained(FOLDER / name)
        print(f"  {name:<12} loss {loss:.3f}  ({time.perf_counter() - began:.0f} s)", flush=True)
    print(f"Saved to {FOLDER}.")


if __name__ == "__main__":
    sys.exit(main())
