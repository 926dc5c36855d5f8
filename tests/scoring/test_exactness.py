"""Random tiny models and lists: whatever way of scoring the program accepts gives what plain transformers gives."""

import math
import random
from contextlib import nullcontext
from functools import partial

import pytest
import reference
import tiny
import torch
import whole
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from modules.checkpoints.checkpoint import open_checkpoint
from modules.mapper.next_tokens import PlainPredictor, build_predictor
from modules.model.loading import load_model
from modules.scoring.budget import Budget
from modules.scoring.exactness import Plain
from modules.scoring.layout import attention_window, build_scorer, is_taken
from modules.scoring.packing import LAYOUTS
from modules.scoring.scorer import Scorer
from modules.scoring.tokenization import Encoded

VOCABULARY, LONGEST, LAYERS = 60, 64, 3
WINDOW = 16  # the middle one of those that are tried
SLIDING, FULL = "sliding_attention", "full_attention"


def rope(chance, *kinds):
    """Rotary settings of one of these kinds; what is switched or stretched by length begins within the lists."""
    kind = chance.choice(kinds or ("default", "linear", "llama3", "yarn", "longrope", "dynamic"))
    original = chance.choice((8, 16, 32))
    factors = {"short_factor": [1.0] * 4, "long_factor": [chance.choice((2.0, 4.0))] * 4}
    more = {
        "default": {},
        "linear": {"factor": 2.0},
        "dynamic": {"factor": 4.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": original},
        "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "longrope": {"factor": 4.0, **factors},
    }[kind]
    if kind in ("llama3", "longrope"):
        more["original_max_position_embeddings"] = original
    return {"rope_type": kind, "rope_theta": 1000.0, **more}


def window(chance):
    return chance.choice((None, WINDOW // 2, WINDOW, 2 * WINDOW))


def layer_types(chance, *kinds):
    return [chance.choice(kinds) for _ in range(LAYERS)]


def common(chance):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": LAYERS, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": chance.choice((1, 2, 4))}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": chance.choice((None, 5))}
    return {**sizes, **heads, **special, "vocab_size": VOCABULARY, "max_position_embeddings": LONGEST}


def mixed(chance):
    """Layers of two kinds, of which one has a window."""
    return {"layer_types": layer_types(chance, SLIDING, FULL), "sliding_window": chance.choice((8, WINDOW, 32))}


def by_kind(chance):
    """Rotary settings of their own for each kind of layer."""
    return {kind: rope(chance, "default", "linear", "yarn", "longrope") for kind in (SLIDING, FULL)}


def without(settings, *keys):
    return {key: value for key, value in settings.items() if key not in keys}


ARCHITECTURES = {
    "llama": lambda c: {**common(c), "rope_parameters": rope(c)},
    "mistral": lambda c: {**common(c), "sliding_window": window(c), "rope_parameters": rope(c)},
    "qwen2": lambda c: {
        **without(common(c), "head_dim"),
        **mixed(c),
        "use_sliding_window": True,
        "rope_parameters": rope(c),
    },
    "gemma2": lambda c: {**common(c), **mixed(c), "rope_parameters": rope(c, "default", "linear")},
    "gemma3_text": lambda c: {**common(c), **mixed(c), "rope_parameters": by_kind(c)},
    "gemma4_text": lambda c: {
        **common(c),
        **mixed(c),
        "global_head_dim": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "layer_types": [SLIDING, FULL, FULL],
        "attention_k_eq_v": c.random() < 0.5,
        "num_global_key_value_heads": c.choice((1, 4)),
        **c.choice(({"hidden_size_per_layer_input": 0}, {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 1})),
    },
    "phi3": lambda c: {
        **without(common(c), "head_dim"),
        "sliding_window": window(c),
        "pad_token_id": 0,
        "original_max_position_embeddings": WINDOW,
        "rope_parameters": rope(c, "default", "longrope"),
    },
    "gpt_neox": lambda c: {
        **without(common(c), "num_key_value_heads", "head_dim"),
        "use_parallel_residual": c.random() < 0.5,
        "rope_parameters": {**rope(c, "default", "linear", "dynamic"), "partial_rotary_factor": c.choice((0.5, 1.0))},
    },
    "falcon": lambda c: {
        **without(common(c), "num_key_value_heads", "head_dim"),
        "alibi": c.random() < 0.7,
        "new_decoder_architecture": False,
        "multi_query": c.random() < 0.5,
    },
    "bloom": lambda c: {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": LAYERS, "n_head": 4},
    "mpt": lambda c: {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "n_heads": 4,
        "n_layers": LAYERS,
        "max_seq_len": LONGEST,
    },
    "opt": lambda c: {
        **without(common(c), "head_dim", "num_key_value_heads"),
        "ffn_dim": 32,
        "word_embed_proj_dim": c.choice((16, 32)),
        "pad_token_id": 5,
    },
    "llama4_text": lambda c: {
        **common(c),
        "intermediate_size_mlp": 32,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": c.choice((8, 16, 32)),
        "attn_temperature_tuning": c.random() < 0.5,
        "floor_scale": 4,
        "layer_types": layer_types(c, "chunked_attention", FULL),
        "rope_parameters": rope(c, "default", "llama3"),
    },
    "lfm2": lambda c: {
        **without(common(c), "head_dim"),
        "layer_types": ["conv", *layer_types(c, "conv", FULL)[:-2], FULL],
        "conv_L_cache": c.choice((2, 3)),
    },
}
OTHERS = {
    "gpt2": lambda c: {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": LONGEST},
    "qwen3": lambda c: {**common(c), **mixed(c), "use_sliding_window": True, "rope_parameters": rope(c)},
    "cohere2": lambda c: {**common(c), **mixed(c), "rope_parameters": rope(c, "default", "linear")},
    "olmo3": lambda c: {**without(common(c), "head_dim"), **mixed(c), "rope_parameters": rope(c, "default", "yarn")},
    "exaone4": lambda c: {**common(c), **mixed(c), "rope_parameters": rope(c)},
    "smollm3": lambda c: {**common(c), **mixed(c), "no_rope_layers": [c.randrange(2) for _ in range(LAYERS)]},
    "gpt_oss": lambda c: {**common(c), **mixed(c), "num_local_experts": 4, "num_experts_per_tok": 2},
    "stablelm": lambda c: {
        **without(common(c), "head_dim"),
        "rope_parameters": {**rope(c, "default", "dynamic"), "partial_rotary_factor": 0.5},
    },
    "mamba": lambda c: {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 8, "num_hidden_layers": LAYERS},
    "gemma3n_text": lambda c: {
        **common(c),
        "layer_types": [SLIDING, FULL, FULL],
        "sliding_window": c.choice((8, 32)),
        "num_kv_shared_layers": c.choice((0, 1)),
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "activation_sparsity_pattern": [0.0] * LAYERS,
        "laurel_rank": 4,
    },
    "jamba": lambda c: {
        **without(common(c), "head_dim"),
        "attn_layer_period": 2,
        "attn_layer_offset": c.randrange(2),
        "expert_layer_period": 2,
        "num_experts": 2,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "xglm": lambda c: {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "ffn_dim": 32,
        "num_layers": LAYERS,
        "attention_heads": 4,
    },
    "roberta": lambda c: {
        **without(common(c), "head_dim", "num_key_value_heads"),
        "max_position_embeddings": LONGEST + 8,
        "is_decoder": True,
        "pad_token_id": 5,
    },
}


def lists(chance):
    """Random pairs, some with a beginning in common, up to four times a window long; a pad token may be among them."""
    beginning = [chance.randrange(VOCABULARY) for _ in range(LONGEST)]
    found = []
    for _ in range(chance.choice((1, 2, 4, 8))):
        length = chance.choice((3, 6, 10, 20, LONGEST))
        shared = chance.choice((0, 1, length // 2, length - 1))
        tokens = beginning[:shared] + [chance.randrange(VOCABULARY) for _ in range(length - shared)]
        found.append(Encoded(tuple(tokens), chance.randrange(max(1, length - 6), length)))
    return found


def make(folder, name, chance):
    settings = {**ARCHITECTURES, **OTHERS}[name](chance)
    config = AutoConfig.for_model(name, **settings)
    tiny.make_model(folder, config, seed=chance.randrange(1000), scale=3.0)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return load_model(open_checkpoint(folder, "model"), "cpu", "float32"), plain


@torch.no_grad()
def plain_scores(model, item):
    """As an evaluation harness has it: the text without its last token, and nothing else."""
    logits = model(torch.tensor([item.tokens[:-1]])).logits[0, item.start - 1 :].float().log_softmax(-1)
    return logits.gather(-1, torch.tensor(item.tokens[item.start :])[:, None])[:, 0]


def assert_exact(found, truths):
    for row, truth in zip(found, truths, strict=True):
        assert (row[: len(truth)] - truth).abs().max() < 1e-4


def check(folder, name, seed):
    chance = random.Random(f"{name} {seed}")
    model, plain = make(folder, name, chance)
    encoded = lists(chance)
    budget = Budget(chance.choice((16, 40, 100, 1000)), chance.choice((2000, 1 << 20)), chance.choice((3000, 1 << 20)))
    truths = [plain_scores(plain, item) for item in encoded]
    scorer = build_scorer(model, encoded, budget)
    assert_exact(scorer.token_scores(), truths)
    for layer in range(LAYERS):
        scorer.at_layer(layer)
        for trial in scorer.trial_token_scores([nullcontext] * 3):
            assert_exact(trial, truths)
    while scorer.take_less_memory() and scorer.budget.tokens > 8:
        assert scorer.score() == pytest.approx([float(truth.sum()) for truth in truths], abs=1e-3)
    for layout in LAYOUTS:
        other = Scorer(model, encoded, layout, budget, 1e-4)
        windowed = layout == "forest" and attention_window(model) < max(len(item.tokens) for item in encoded)
        if not windowed and is_taken(partial(other.agrees, Plain(model))):
            assert_exact(other.token_scores(), truths)
    check_continuation(model, plain, scorer, encoded, chance)
    return scorer


@torch.no_grad()
def check_continuation(model, plain, scorer, encoded, chance):
    """The mapper's way to go on, from every beginning to the end, by other tokens than those it was verified with."""
    paths, steps = [item.tokens[: item.start][:40] for item in encoded], 6
    most = max(map(len, paths)) + steps
    predictor = build_predictor(model, None, scorer, paths, most)
    for _ in range(steps + 1):
        for path, guesses in zip(paths, predictor.next_tokens(paths, [""] * len(paths), 5), strict=True):
            truth = plain(torch.tensor([path])).logits[0, -1].float().log_softmax(-1)
            for token, found in guesses:
                assert abs(found - truth[token]) < 1e-4
        paths = [(*path, chance.randrange(VOCABULARY)) for path in paths]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_way_that_is_accepted_gives_what_plain_transformers_gives(name, tmp_path):
    check(tmp_path, name, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 16))
@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS])
def test_many_random_models(name, seed, tmp_path):
    check(tmp_path, name, seed)


# ---------------------------------------------------------------------------------------------------------------------
# What random models seldom show
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def switching(tmp_path):
    """A model that switches its rotary factors for texts of more than 16 tokens; and as transformers has it."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 16}
    rope_parameters = {"rope_type": "longrope", "factor": 4.0, "rope_theta": 1000.0, **factors}
    tiny.make_model(tmp_path, tiny.llama_config(VOCABULARY, layers=LAYERS, rope_parameters=rope_parameters))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    return load_model(open_checkpoint(tmp_path, "model"), "cpu", "float32"), plain


def texts(*lengths):
    """Random pairs of so many input tokens, of which the phrases are the last three."""
    chance = random.Random(0)
    rows = [[chance.randrange(VOCABULARY) for _ in range(length + 1)] for length in lengths]
    return [Encoded(tuple(row), len(row) - 3) for row in rows]


def test_one_long_pair_changes_no_other(switching):
    model, plain = switching
    encoded = texts(8, 12, 10, 40)
    scorer = build_scorer(model, encoded)
    assert scorer.layout == "single"
    assert_exact(scorer.token_scores(), [plain_scores(plain, item) for item in encoded])
    assert build_scorer(model, encoded[:3]).layout == "forest"


def test_packs_that_are_made_smaller_are_verified_again(switching):
    """As rows, seven pairs fill a pack before the longer ones; of half the size, one pack holds both kinds."""
    model, plain = switching
    encoded = texts(*[16] * 7, *[17] * 4)
    scorer = build_scorer(model, encoded, Budget(tokens=112))
    assert scorer.layout == "rows" and scorer.packs == 2
    assert scorer.take_less_memory() == "continuing with packs of 56 tokens"
    truths = [plain_scores(plain, item) for item in encoded]
    assert scorer.score() == pytest.approx([float(truth.sum()) for truth in truths], abs=1e-4)
    scorer.at_layer(1)
    for trial in scorer.trial_token_scores([nullcontext] * 2):
        assert_exact(trial, truths)


def test_the_mapper_sees_that_a_text_will_grow_too_long_for_its_kept_keys(switching):
    model, plain = switching
    encoded = texts(12, 10, 13)
    scorer = build_scorer(model, encoded, tails=False)
    assert scorer.layout == "forest"
    paths = [item.tokens[:-1] for item in encoded]
    assert not isinstance(build_predictor(model, None, scorer, paths, 16), PlainPredictor)
    predictor = build_predictor(model, None, scorer, paths, 20)
    for length in range(10, 20):
        asked = [(path * 2)[:length] for path in paths]
        found = predictor.log_probabilities(asked)
        for row, path in zip(found, asked, strict=True):
            truth = plain(torch.tensor([path])).logits[0, -1].float().log_softmax(-1)
            assert (row - truth).abs().max() < 1e-4


def test_where_texts_of_a_batch_touch_each_other_trials_go_one_at_a_time(tmp_path):
    model, _ = make(tmp_path, "gpt2", random.Random(1))
    model.layers[-1].mlp.register_forward_hook(lambda _layer, _inputs, output: 2 * output - output.mean(0))
    encoded = texts(8, 12, 10)
    scorer = build_scorer(model, encoded)
    assert (scorer.layout, scorer.stacks) == ("forest", False)
    truths = [plain_scores(model.module, item) for item in encoded]
    assert_exact(scorer.trial_token_scores([lambda: halved(model), nullcontext])[1], truths)


@pytest.mark.parametrize("name, layout", [("gpt2", "forest"), ("bloom", "single")])
def test_where_texts_of_a_batch_touch_each_other_each_goes_alone_to_be_compared(name, layout, tmp_path):
    """Texts of one length: rows of them are what plain forwards would be, if those went together."""
    model, _ = make(tmp_path, name, random.Random(1))
    model.layers[-1].mlp.register_forward_hook(lambda _layer, _inputs, output: 2 * output - output.mean(0))
    encoded = texts(10, 10, 10)
    scorer = build_scorer(model, encoded)
    assert scorer.layout == layout
    assert_exact(scorer.token_scores(), [plain_scores(model.module, item) for item in encoded])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_forwards_together_are_those_alone(dtype, tmp_path):
    make(tmp_path, "llama", random.Random(2))
    model = load_model(open_checkpoint(tmp_path, "model"), "cpu", dtype)
    encoded = texts(9, 14, 9, 14, 9, 12)
    plain = Plain(model, 0.1)
    forwards = []
    model.module.register_forward_hook(lambda _model, _inputs, output: forwards.append(len(output.logits)))
    for item, found in zip(encoded, plain.token_scores(encoded, Budget()), strict=True):
        assert (found - plain_scores(model.module, item)).abs().max() < (1e-4 if dtype == "float32" else 0.1)
    assert forwards[:4] == [3, 1, 1, 2]  # the second to see whether three at a time are exact
    plain.token_scores(encoded, Budget())
    assert len(forwards) == 4 + len(encoded)


def test_pairs_that_are_compared_differ_in_length_and_place(tmp_path):
    model, _ = make(tmp_path, "llama", random.Random(3))
    alike = Scorer(model, texts(*[12] * 40), "forest")
    assert len(alike.compared()) == 2
    unlike = Scorer(model, texts(*range(10, 40), *range(10, 40)), "forest", Budget(tokens=1 << 20))
    lengths = [len(unlike.encoded[pair].tokens) for pair in unlike.compared()]
    assert len(lengths) <= 14 and lengths[0] == 11 and lengths[-1] == 40 and len(set(lengths)) >= 6
    packs = Scorer(model, texts(*range(10, 40)), "rows", Budget(tokens=100))
    compared = {packs.encoded[pair] for pair in packs.compared()}
    for inputs in packs.packs_here:
        pack = [packs.encoded[pair] for pair in inputs.targets.pairs.tolist()]
        assert compared >= {max(pack, key=lambda item: len(item.tokens)), min(pack, key=lambda item: len(item.tokens))}


def halved(model):
    """The first layer's weights, for a moment."""
    part = model.layer(0)
    return part.holding({name: tensor / 2 for name, tensor in part.tensors.items()})


def gemma4(folder, shared):
    """Layers of other heads than others, of which the last may take keys and values from one before it."""
    tokenizer = tiny.bpe_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 8, "global_head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_global_key_value_heads": 1}
    rows = {"vocab_size": len(tokenizer), "vocab_size_per_layer_input": len(tokenizer)}
    kinds = {"layer_types": [SLIDING, FULL] * 2, "sliding_window": 64, "num_kv_shared_layers": shared}
    more = {"attention_k_eq_v": True, "hidden_size_per_layer_input": 8, "bos_token_id": 0, "eos_token_id": 1}
    return tiny.make_model(
        folder, AutoConfig.for_model("gemma4_text", **sizes, **heads, **rows, **kinds, **more), tokenizer
    )


@pytest.mark.parametrize("shared", [0, 2])
def test_layers_that_differ_among_themselves_are_merged(shared, tmp_path):
    base = gemma4(tmp_path / "base", shared)
    run = whole.run(tmp_path, base, [tiny.make_candidate(tmp_path / "one", base)])
    assert run.code == 0, run.output
    assert run.layout == "forest" and ("each ratio takes a full forward pass" in run.output) == bool(shared)
    assert any(changed for _, changed, _ in run.decisions)
    model, tokenizer = reference.load(tmp_path / "out", torch.float32), AutoTokenizer.from_pretrained(base)
    exact = [reference.log_probability(model, tokenizer, pair.context, pair.phrase) for pair in tiny.PAIRS]
    assert run.last_table == pytest.approx([100 * math.exp(value) for value in exact], rel=1e-3, abs=1e-5)
