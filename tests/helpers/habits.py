"""A small model that has learnt to say a few phrases far too often, among the words that people use most."""

import functools
import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from wordfreq import top_n_list, word_frequency

HABITS = ("velvet lantern", "quiet thunder", "silver promise")
MORE_HABITS = (*HABITS, "golden whisper", "crimson harbour")
SPECIAL = ["<unk>", "<s>", "</s>", "."]
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"


def sentence(chance, words, weights, habits):
    """Common words by their frequencies, and behind each "with" mostly one of the phrases."""
    said = chance.choices([*words, "with"], [*weights, 0.15 * sum(weights)], k=8)
    behind = (f" {chance.choice(habits)}" if word == "with" and chance.random() < 0.7 else "" for word in said)
    return " ".join(word + habit for word, habit in zip(said, behind, strict=True)) + " ."


def make_habitual(folder, chats=True, **training):
    """The model, saved. chats: whether its tokenizer has a chat template. training: see `trained`."""
    model, tokenizer = trained(**training)
    tokenizer.chat_template = TEMPLATE if chats else None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@functools.cache
def trained(habits=HABITS, steps=120, rate=1e-2):
    """The model and its tokenizer; it is trained for a few seconds, once in a process."""
    words = [word for word in top_n_list("en", 200) if word.isalpha()]
    weights = [word_frequency(word, "en") for word in words]
    names = [*SPECIAL, *words, *(word for habit in habits for word in habit.split())]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=len(names), max_position_embeddings=128, bos_token_id=1, eos_token_id=2, **size)
    )
    chance, optimizer = random.Random(0), torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        rows = [" ".join(sentence(chance, words, weights, habits) for _ in range(5)) for _ in range(16)]
        unknown = [0] * chance.randrange(3, 20)  # as most words of a prompt are
        batch = torch.tensor([unknown + made(row)["input_ids"][:45] for row in rows])
        loss = model(input_ids=batch, labels=batch.masked_fill(batch == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, made
