"""Models mixed from a base and candidates: the streamed gradient on shares against autograd through whole models."""

from types import SimpleNamespace

import mixes
import pytest
import tiny
import torch
from adapters import make_adapter
from architectures import ARCHITECTURES, configuration
from mixes import mixed
from safetensors.torch import load_file

from modules.checkpoints.open_models import open_models
from modules.config.load import load_config
from modules.model import part
from modules.runtime.errors import BrokenWeights, ConfigError
from modules.scoring.budget import Budget
from modules.scoring.objective import AT_ONCE, Objective
from modules.search.joint import Joint, JointState

FILE = "model.safetensors"

SHARES = [[0.3, 0.2], [0.5, 0.1], [0.4, 0.25], [0.0, 0.7]]


def check(base, folders, candidates=None, neutral=True, outside=True, tolerance=1e-8, **more):
    """The gradient by every share, and the objective, are those of the twin."""
    one = mixed(base, candidates or folders, neutral=neutral, outside=outside, **more)
    shares = SHARES[: one.mix.rows]
    expected, found = one.expected(shares, folders, neutral, outside), one.found(shares)
    size = max(abs(value) for row in expected[2] for value in row)
    assert size > 1e-3 and found[:2] == pytest.approx(expected[:2], rel=tolerance)
    for ours, theirs in zip(found[2], expected[2], strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance * size)
    return one


@pytest.mark.sampled(12)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_gradient_is_that_of_whole_models(tmp_path, name):
    check(*mixes.make(tmp_path, configuration(name, len(tiny.bpe_tokenizer()))))


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def llamas(request, tmp_path_factory):
    config = tiny.llama_config(len(tiny.bpe_tokenizer()), tied=request.param)
    return mixes.make(tmp_path_factory.mktemp("llamas"), config)


@pytest.mark.parametrize("layout", ["forest", "rows", "single"])
def test_in_every_layout(llamas, layout):
    check(*llamas, layout=layout)


@pytest.mark.parametrize("outside", [True, False], ids=["", "layers only"])
@pytest.mark.parametrize("layers", [[0, 2], [1]], ids=str)
def test_where_some_layers_are_mixed_the_others_have_no_gradient_and_stay_the_base_s(llamas, layers, outside):
    base, folders = llamas
    one = mixed(base, folders, outside=outside, layers=layers)
    shares = one.mix.limited(SHARES[: one.mix.rows])
    assert [any(row) for row in shares] == [number in (*layers, 3) for number in range(one.mix.rows)]
    expected, found = one.expected(shares, folders, outside=outside), one.found(shares)
    assert found[:2] == pytest.approx(expected[:2], rel=1e-8)
    for row, ours, theirs in zip(shares, found[2], expected[2], strict=True):
        assert list(ours) == (pytest.approx(theirs, rel=1e-8) if any(row) else [0.0, 0.0])
    own = {name: tensor.clone() for name, tensor in one.model.module.state_dict().items()}
    with mixes.InDouble():
        state = JointState.at(shares)
        for _ in range(2):
            state, _ = Joint(one.mix, one.objective).step(state)
    stored = load_file(base / FILE)
    for name, tensor in one.model.module.state_dict().items():
        still = ".layers." in name and int(name.split(".")[2]) not in layers
        assert not torch.equal(tensor, own[name]) or still or not outside
        assert not still or torch.equal(tensor, stored[name].double())


@pytest.mark.parametrize("here, beside", [(0, 0), (2, 0), (1, 1)])
def test_wherever_hidden_states_are_kept(llamas, here, beside):
    """Of no layer, of the first, of every second, of all; on the device or beside it."""
    base, folders = llamas
    one = mixed(base, folders, budget=Budget(tokens=20))
    size = sum(text.ids.numel() for text in one.objective.texts) * 32 * 8
    one.objective.budget = Budget(tokens=20, cache=here * size, cache_beside=beside * size)
    assert len(one.objective.texts) > 4
    expected, found = one.expected(SHARES, folders), one.found(SHARES)
    for ours, theirs in zip(found[2], expected[2], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-8)


@pytest.mark.parametrize("name", ["Gemma 2", "Phi"])
def test_in_small_blocks_of_rows_and_positions(tmp_path, monkeypatch, name):
    """Tied and untied, with a bias, with a soft cap: ninety rows of the head at a time, at five positions."""
    monkeypatch.setattr(part, "ROWS", 4 * 32 * 90)
    made = mixes.make(tmp_path, configuration(name, len(tiny.bpe_tokenizer())))
    check(*made, budget=Budget(logits=AT_ONCE * 4 * 90 * 5))


@pytest.mark.parametrize("neutral, outside", [(False, True), (True, False)])
def test_without_neutral_text_or_the_header(llamas, neutral, outside):
    check(*llamas, neutral=neutral, outside=outside)


def test_an_adapter_is_mixed_as_the_model_that_it_makes(tmp_path):
    base, folders = mixes.make(tmp_path, tiny.llama_config(len(tiny.bpe_tokenizer())), 1)
    adapter, whole = make_adapter(tmp_path, base, target_modules=["embed_tokens", "lm_head", "v_proj"])
    config = load_config(tiny.write_config(tmp_path / "my.yaml", base, [adapter], tmp_path / "out"))
    candidates = [*folders, lambda model: open_models(config, lambda job: None).candidates[0]]
    check(base, [*folders, whole], candidates, tolerance=1e-5)  # PEFT rounds the model that it makes


def test_rows_are_matched_by_token(tmp_path):
    """Two tokens more, an end of another name, all rows at other places; of one token it has no row."""
    base, folders = mixes.with_rows_elsewhere(tmp_path)
    one = check(base, folders)
    assert "of them at a different index" in one.mix.notes[0] and "lacks their tokens" in one.mix.notes[0]


def test_a_header_that_cannot_be_matched_is_left_out(tmp_path):
    tokenizer = tiny.bpe_tokenizer()
    base, folders = mixes.make(tmp_path, tiny.llama_config(len(tokenizer)), tokenizer=tokenizer)
    names = {token: f"other {row}" for token, row in tokenizer.get_vocab().items() if row > 300}
    tiny.rewritten_tokenizer(tokenizer, None, names).save_pretrained(folders[0])
    one = mixed(base, folders)
    assert "shares only" in one.mix.notes[0]
    assert one.mix.header_weights([[0.5, 0.5]]) == [0.0, 0.5]
    with mixes.InDouble():
        one.mix.compose([[1.0, 0.0]] * one.mix.rows)
    state, theirs, ours = (one.model.module.state_dict(), load_file(folders[0] / FILE), load_file(base / FILE))
    for name in theirs:
        source = ours if "embed" in name or "head" in name else theirs
        assert torch.equal(state[name], source[name].double()), name


def test_the_ends_are_base_and_candidate_to_the_last_bit(llamas):
    base, folders = llamas
    one = mixed(base, folders, compute="float32")
    for row, folder in (([0.0, 0.0], base), ([1.0, 0.0], folders[0]), ([0.0, 1.0], folders[1])):
        one.mix.compose([[0.3, 0.4]] * one.mix.rows)
        one.mix.compose([row] * one.mix.rows, exact=True)
        for name, tensor in load_file(folder / FILE).items():
            assert torch.equal(one.model.module.state_dict()[name], tensor), name


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_what_is_kept_is_rounded_once_and_what_has_no_share_is_copied(tmp_path, compute):
    """Two stored types, as checkpoints have them; the header and a layer without any share."""
    tokenizer = tiny.bpe_tokenizer()
    base, folders = mixes.make(tmp_path, tiny.llama_config(len(tokenizer)), tokenizer=tokenizer)
    for folder in (base, *folders):
        tiny.edit_checkpoint(
            folder, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items() if ".0." in n})
        )
    one = mixed(base, folders, compute=compute)
    one.mix.compose([[0.5, 0.9]] * one.mix.rows)
    one.mix.compose([[0.3, 0.25], [0.0, 0.0], [0.07, 0.0], [0.0, 0.0]], exact=True)
    before = {name: tensor.clone() for name, tensor in one.model.module.state_dict().items()}
    ours, first, second = (load_file(folder / FILE) for folder in (base, *folders))
    for name, tensor in before.items():
        kept = torch.float32 if compute == "float32" and ".0." not in name else torch.bfloat16
        shares = next((pair for key, pair in {".0.": (0.3, 0.25), ".2.": (0.07, 0)}.items() if key in name), (0, 0))
        if not any(shares):
            assert torch.equal(tensor, ours[name].to(tensor.dtype)), name
            continue
        parts = [one[name].to(tensor.dtype).double() for one in (ours, first, second)]
        exact = parts[0] * (1 - sum(shares)) + parts[1] * shares[0] + parts[2] * shares[1]
        assert torch.equal(tensor, tensor.to(kept).to(tensor.dtype)), name
        rounding = torch.finfo(kept).eps * (4 if kept == torch.float32 else 1)  # of sums in float32, then of the type
        torch.testing.assert_close(tensor.double(), exact, rtol=rounding, atol=1e-7)


def test_with_less_memory_it_is_the_same(llamas):
    """Smaller packs, and fewer windows of neutral text at a time, while the model is the base no more."""
    base, folders = llamas
    one = mixed(base, folders)
    expected, texts = one.found(SHARES), len(one.objective.texts)
    assert one.scorer.take_less_memory() and one.scorer.take_less_memory()
    one.objective = one.objective.packed_as(one.scorer)
    found = one.found(SHARES)
    assert len(one.objective.texts) >= texts + 3
    assert found[:2] == pytest.approx(expected[:2], rel=1e-9)
    for ours, theirs in zip(found[2], expected[2], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-8)


def test_half_types_give_about_the_same(llamas):
    base, folders = llamas
    exact = mixed(base, folders).found(SHARES)[2]
    size = max(abs(value) for row in exact for value in row)
    for compute in ("bfloat16", "float16"):
        one = mixed(base, folders, compute=compute)
        one.mix.compose(SHARES)
        found = Joint(one.mix, one.objective).gradient(SHARES)
        for ours, theirs in zip(found, exact, strict=True):
            assert ours == pytest.approx(theirs, abs=0.1 * size), compute


def test_a_model_without_tails_is_refused(llamas):
    one = mixed(*llamas)
    scorer = SimpleNamespace(has_tails=False)
    with pytest.raises(ConfigError, match="LlamaForCausalLM: search: joint is not supported"):
        Objective(one.model, scorer, one.weights)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_broken_weights_are_found(tmp_path, name):
    base, folders = mixes.make(tmp_path, tiny.llama_config(len(tiny.bpe_tokenizer())))
    tiny.edit_checkpoint(folders[1], lambda tensors: tensors[name][5].fill_(torch.inf))
    one = mixed(base, folders)
    with pytest.raises(BrokenWeights, match=f"other-2: {name} holds NaN or infinite values"):
        one.found(SHARES)
