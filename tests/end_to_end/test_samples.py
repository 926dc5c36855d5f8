"""Samples: what base and merge answer is what whole forwards lead to, and changes nothing else; several at a time."""

import json
import random

import architectures
import pytest
import tiny
import torch
from huggingface_hub import constants
from runs import digest, log_of, make_models, merge
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, LlamaForCausalLM

import merge_monster
from modules.checkpoints.checkpoint import open_checkpoint
from modules.model.loading import load_model
from modules.output.recipe import RECIPE_FILE
from modules.runtime.errors import ConfigError
from modules.scoring.chats import CONTEXTS, Asked, chat_of, render
from modules.scoring.samples import BATCH, DEFAULT, SamplingParams, batches, encoded, sample
from modules.scoring.tokenization import encode_prompt
from modules.search.search import Search

PROMPTS = ["Her eyes were filled with", "Where is the apple?"]
TEMPLATE = (
    "<s>{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)


def models_in(folder, family, template):
    models = make_models(folder, family=family)
    for model in models:
        (model / "chat_template.jinja").unlink()
        if template:
            (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    return models


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing is kept of what another test's models have answered."""
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))


@pytest.fixture(scope="module", params=["bpe", "spm"])
def models(request, tmp_path_factory):
    """Without a chat template."""
    return models_in(tmp_path_factory.mktemp("models"), request.param, None)


def recipe_of(folder):
    return json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))


def given_to(model, tokenizer, prompts):
    """Token ids of prompts."""
    tokens, problems = encoded(model, tokenizer, prompts, Asked())
    assert problems == []
    return tokens


def texts_of(model, tokenizer, prompts, seed=512, params=DEFAULT):
    """The texts to each of some prompts of one length."""
    written = sample(model, tokenizer, given_to(model, tokenizer, prompts), seed, params)
    return [
        [tokenizer.decode(text.without_end, skip_special_tokens=True).strip() for text in texts] for texts in written
    ]


def next_token(logits, chance, texts=1):
    """The first token up to which the probabilities add up to more than a number from 0 to 1; of each of the texts that
    are drawn from one chance, its number at each step."""
    parts = torch.rand(texts, generator=chance, dtype=torch.double).tolist()
    total, tokens = [0.0] * texts, [None] * texts
    for text, (part, row) in enumerate(zip(parts, (logits.double() / 0.8).softmax(-1).tolist(), strict=True)):
        for token, share in enumerate(row):
            total[text] += share
            if total[text] > part and tokens[text] is None:
                tokens[text] = token
    return tokens


@torch.no_grad()
def generated(folder, prompt, seed=512, chat=False):
    """What whole forwards of a model's folder, by plain transformers, lead to, token by token."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    if chat:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    ends = [1, tokenizer.eos_token_id]  # of config.json, and of the tokenizer
    chance, new = torch.Generator().manual_seed(random.Random(f"{seed} {prompt}").getrandbits(63)), []
    while len(new) < 96 and not set(new) & set(ends):
        new += next_token(model(input_ids=torch.tensor([ids + new])).logits[:, -1], chance)
    return tokenizer.decode(new, skip_special_tokens=True).strip()


def test_both_answer_what_whole_forwards_lead_to(place, models):
    assert merge(place, models, samples=PROMPTS) == 0
    found = recipe_of(place / "out")["samples"]
    assert [one["prompt"] for one in found] == PROMPTS
    for one in found:
        assert one["base"] == generated(models[0], one["prompt"])
        assert one["merge"] == generated(place / "out", one["prompt"])
        assert len(one["base"]) > 5 and one["base"] != one["merge"]
    log, card = log_of(place), (place / "out/README.md").read_text(encoding="utf-8")
    assert f"Prompt:  {PROMPTS[1]}\n  base:  " in log and "## Samples" in card
    # A replay asks nobody, and tells the same.
    replay = ["--replay", str(place / "out"), "--output", str(place / "again"), "--source", str(models[0].parent)]
    assert merge_monster.main(replay) == 0
    assert recipe_of(place / "again")["samples"] == found


def test_a_chat_template_is_used_and_writes_bos_once(place, tmp_path):
    models = models_in(tmp_path, "spm", TEMPLATE)  # a tokenizer that puts BOS before every text
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    (text,) = render(tokenizer, "base", {chat_of(PROMPTS[0]): CONTEXTS}, None).texts.values()
    tokens = encode_prompt(tokenizer, PROMPTS[0], len(tokenizer), None, text)
    assert tokens.count(tokenizer.bos_token_id) == 1 and tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokens).endswith(f"[user] {PROMPTS[0]}:")
    assert merge(place, models, samples=PROMPTS) == 0
    for one in recipe_of(place / "out")["samples"]:
        assert one["base"] == generated(models[0], one["prompt"], chat=True)
        assert one["merge"] == generated(place / "out", one["prompt"], chat=True)


def test_a_text_that_writes_bos_itself_has_it_once(models):
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    tokens = encode_prompt(tokenizer, "<s>Her eyes", len(tokenizer), None)
    assert tokens.count(tokenizer.bos_token_id) == 1 and tokenizer.eos_token_id not in tokens


def test_nothing_depends_on_them(place, models):
    assert merge(place, models, samples=PROMPTS) == 0
    found, files = recipe_of(place / "out"), digest(place / "out")
    assert merge(place, models, "--overwrite", samples=[]) == 0
    without = recipe_of(place / "out")
    assert without["samples"] == [] and "Answers of base and merge" not in log_of(place)
    assert "## Samples" not in (place / "out/README.md").read_text(encoding="utf-8")
    for recipe in (found, without):
        for decision in recipe["decisions"]:
            del decision["seconds"]
    assert all(found[key] == without[key] for key in ("decisions", "phrases", "metrics", "composition"))
    told = {RECIPE_FILE, "README.md", "merge_monster.yaml", "merge_monster_journal.jsonl"}
    now = digest(place / "out")
    assert {name: now[name] for name in now.keys() - told} == {name: files[name] for name in files.keys() - told}


def test_two_runs_and_one_that_goes_on_are_told_the_same(place, models, monkeypatch):
    own, decided = Search._decide, []

    def stopped(self, *arguments):
        decided.append(1)
        if len(decided) == 6:  # of the second candidate
            raise KeyboardInterrupt
        return own(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Search, "_decide", stopped)
        assert merge(place, models, samples=PROMPTS[:1]) == 130
    assert merge(place, models, "--resume", samples=PROMPTS) == 0  # with other prompts it is no other run
    found = recipe_of(place / "out")["samples"]
    assert "Resuming: " in log_of(place) and len(found) == 2
    assert merge(place, models, "--overwrite", samples=PROMPTS[::-1]) == 0
    assert recipe_of(place / "out")["samples"] == found[::-1]


def test_chance_is_as_it_was_and_settings_of_the_checkpoint_have_no_part(models, tmp_path):
    checkpoint = open_checkpoint(models[0], "base")
    model, tokenizer = load_model(checkpoint, "cpu", "auto"), AutoTokenizer.from_pretrained(models[0])
    own = model.module.generation_config
    before = torch.get_rng_state()
    found = texts_of(model, tokenizer, PROMPTS[:1])
    assert torch.equal(torch.get_rng_state(), before) and model.module.generation_config is own
    for name, value in {"top_k": 1, "min_new_tokens": 90, "repetition_penalty": 3.0, "max_length": 7}.items():
        setattr(own, name, value)
    assert texts_of(model, tokenizer, PROMPTS[:1]) == found != texts_of(model, tokenizer, PROMPTS[:1], seed=513)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_every_architecture_answers_and_scores_afterwards_as_before(tmp_path, name):
    """Against whole forwards that keep nothing of the tokens before."""
    tokenizer = tiny.bpe_tokenizer()
    base = tiny.make_model(tmp_path / "base", architectures.configuration(name, len(tokenizer)), tokenizer)
    model = load_model(open_checkpoint(base, "base"), "cpu", "auto")

    @torch.no_grad()
    def logits(ids):
        return model.module(input_ids=torch.tensor([ids]), use_cache=False).logits

    before = logits(list(range(3, 40)))
    found = {prompt: texts_of(model, tokenizer, [prompt])[0][0] for prompt in PROMPTS}
    assert torch.equal(logits(list(range(3, 40))), before)
    for prompt in PROMPTS:
        chance = torch.Generator().manual_seed(random.Random(f"512 {prompt}").getrandbits(63))
        ids, new = tokenizer(prompt)["input_ids"], []
        while len(new) < 96 and (not new or new[-1] != tokenizer.eos_token_id):
            new += next_token(logits(ids + new)[:, -1], chance)
        assert found[prompt] == tokenizer.decode(new, skip_special_tokens=True).strip()


def test_texts_that_are_drawn_together(models):
    """Prompts of any lengths, one with an end token in it, three texts of each: as if each prompt were alone."""
    model = load_model(open_checkpoint(models[0], "base"), "cpu", "float32")
    tokenizer, params = AutoTokenizer.from_pretrained(models[0]), SamplingParams(tokens=30, count=3)
    prompts = [
        "Her eyes were filled with",
        "His eyes were filled with",
        "Where is the apple?",
        PROMPTS[1] + "</s> Where?",
    ]
    lengths = set(map(len, given_to(model, tokenizer, prompts).values()))
    assert len(lengths) > 1
    found = texts_of(model, tokenizer, prompts, params=params)
    assert found == [texts_of(model, tokenizer, [prompt], params=params)[0] for prompt in prompts]
    ends = model.end_tokens() | {tokenizer.eos_token_id}
    for prompt, texts in zip(prompts, found, strict=False):
        chance = torch.Generator().manual_seed(random.Random(f"512 {prompt}").getrandbits(63))
        ids, new = tokenizer(prompt)["input_ids"], [[] for _ in texts]
        for _ in range(30):
            rows = [model.module(input_ids=torch.tensor([ids + row])).logits[0, -1] for row in new]
            for row, token in zip(new, next_token(torch.stack(rows), chance, 3), strict=True):
                row.append(token)
        ended = [row[: next((n for n, token in enumerate(row) if token in ends), 30)] for row in new]
        assert texts == [tokenizer.decode(row, skip_special_tokens=True).strip() for row in ended]
        assert len(set(texts)) == 3


def test_no_more_texts_at_once_than_the_most(models, monkeypatch):
    model = load_model(open_checkpoint(models[0], "base"), "cpu", "float32")
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    prompts = [f"{word} eyes were filled with" for word in ("Her", "His", "Its", "My", "Our")]
    lengths = {len(tokenizer(prompt)["input_ids"]) for prompt in prompts[:2]}
    assert len(lengths) == 1
    given = given_to(model, tokenizer, prompts[:2])
    assert batches(model, given, BATCH) == [prompts[:1], prompts[1:2]]
    assert batches(model, given, BATCH // 2) == [prompts[:2]]
    lengths = {"a": [3] * 9, "b": [3] * 5, "c": [3] * 9, "d": [3] * 7}
    assert batches(model, lengths, BATCH // 3) == [["b", "d", "a"], ["c"]]
    monkeypatch.setattr(type(model), "token_rules", lambda self: {"begin_suppress_tokens": [3]})
    assert batches(model, lengths, BATCH // 3) == [["b"], ["d"], ["a", "c"]]


@pytest.mark.parametrize("error", [ValueError("no\ncache"), torch.OutOfMemoryError("out of memory"), TypeError("x")])
@pytest.mark.parametrize("turn", [1, 2])
def test_a_model_that_can_not_generate_is_merged_all_the_same(place, models, monkeypatch, turn, error):
    own, turns = GenerationMixin.generate, []

    def failing(self, *arguments, **more):
        turns.append(1)
        if len(turns) == turn:
            raise error
        return own(self, *arguments, **more)

    monkeypatch.setattr(LlamaForCausalLM, "generate", failing)
    assert merge(place, models, samples=PROMPTS[:1]) == 0
    assert recipe_of(place / "out")["samples"] == [] and len(turns) == turn
    assert log_of(place).count("WARNING: can't generate answers: ") == 1
    assert (place / "out/model.safetensors").is_file()


def test_answers_that_are_no_numbers(place, models, monkeypatch):
    """On a device, drawing from them would end the device."""
    own = LlamaForCausalLM.forward

    def broken(self, *arguments, **more):
        result = own(self, *arguments, **more)
        if more.get("use_cache"):
            result.logits = result.logits * float("nan")
        return result

    monkeypatch.setattr(LlamaForCausalLM, "forward", broken)
    assert merge(place, models, samples=PROMPTS) == 0
    warning = "WARNING: can't generate answers: the model's probabilities are NaN or infinite"
    assert log_of(place).count(warning) == 1


def test_a_template_that_raises(place, tmp_path):
    models = models_in(tmp_path, "bpe", "{{ raise_exception('only systems here') }}")
    assert merge(place, models, samples=PROMPTS) == 0
    (line,) = [line for line in log_of(place).splitlines() if "skipping 2 prompts: " in line]
    assert f"{models[0]}: " in line and "only systems here" in line


def test_a_prompt_that_does_not_fit_is_named_and_left_out(place, models):
    long = "apple " * 300
    assert merge(place, models, samples=[long, PROMPTS[0], "é" * 60]) == 0
    found, log = recipe_of(place / "out")["samples"], log_of(place)
    assert [one["prompt"] for one in found] == [PROMPTS[0], "é" * 60]
    assert log.count("tokens long, but the base model takes 256 with the answer") == 1
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    with pytest.raises(ConfigError, match="no embedding for its token"):
        encode_prompt(tokenizer, "apple", 10, None)


def test_a_wrong_key_is_named(place, models, capsys):
    assert merge(place, models, samples="one") == 2 and "samples" in capsys.readouterr().err
    assert merge(place, models, samples=["", 3]) == 2
    error = capsys.readouterr().err
    assert "samples[0]" in error and "samples[1]" in error and "put it in quotes" in error
