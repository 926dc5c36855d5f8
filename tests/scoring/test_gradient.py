"""The streamed gradient on every tensor of a model against autograd through the whole model."""

import mixes
import pytest
import reference
import tiny
import torch
from architectures import configuration
from mixes import InDouble, mixed

from modules.model import part
from modules.scoring.budget import Budget
from modules.scoring.gradient import ActivationCheckpoints, GradientPass
from modules.scoring.objective import AT_ONCE, Objective


def streamed(objective):
    """All gradients by name, put together from their parts; the objective's value."""
    model, work, found = objective.model, GradientPass(objective), {}
    state = {name: torch.zeros_like(tensor) for name, tensor in model.module.named_parameters()}
    work.begin()
    for first, end in objective.blocks:
        base = {name: tensor[first:end] for name, tensor in model.original_head().items()}
        for name, gradient in work.head_block(first, end, base).items():
            assert len(gradient) == end - first
            state[name][first:end] += gradient
    for layer in reversed(range(len(model.layers))):
        found.update(work.layer(layer))
    front = work.front()
    assert front.rows.tolist() == objective.vocabulary.tolist()
    state[model.embedding_name][front.rows] += front.values
    for name, gradient in {**found, **front.dense}.items():
        state[name] = gradient
    return {name: tensor / work.scale for name, tensor in state.items()}, work.value()


def check(one, neutral=True):
    """Every gradient is that of the twin, at weights that are not the base's."""
    with InDouble():
        one.mix.compose([[0.4, 0.3]] * one.mix.rows)
        found, value = streamed(one.objective)
        base, module = mixes.plain(one.folder), mixes.plain(one.folder).requires_grad_(True)
        module.load_state_dict({name: tensor.clone() for name, tensor in one.model.module.state_dict().items()})
        total, divergence, objective = reference.objective(
            base, lambda tokens: reference.said(module, tokens), *one.measured(neutral)
        )
        objective.backward()
    expected = value.total, value.metrics.get("kl", 0.0), value.objective
    assert expected == pytest.approx((float(total), float(divergence), float(objective)), rel=1e-8)
    size = max(float(own.grad.abs().max()) for own in module.parameters() if own.grad is not None)
    assert size > 1e-3
    for name, own in module.named_parameters():
        gradient = torch.zeros_like(own) if own.grad is None else own.grad
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-8 * size, msg=name)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Gemma 2", "BLOOM", "Mixtral", "OPT", "Phi", "Cohere 2"])
def test_every_gradient_is_that_of_the_whole_model(tmp_path, name):
    check(mixed(*mixes.make(tmp_path, configuration(name, len(tiny.bpe_tokenizer())))))


def test_in_many_packs_and_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(part, "ROWS", 4 * 32 * 90)
    made = mixes.make(tmp_path, tiny.llama_config(len(tiny.bpe_tokenizer()), tied=True))
    one = mixed(*made, budget=Budget(tokens=20, logits=AT_ONCE * 4 * 90 * 5))
    assert len(one.objective.blocks) == 5 and len(one.objective.texts) > 4
    check(one)


def test_pairs_that_ask_for_the_same_token_at_the_same_place(tmp_path):
    """And a token that pads, which has a gradient like all others."""
    tokenizer = tiny.bpe_tokenizer()
    config = tiny.llama_config(len(tokenizer), pad_token_id=tokenizer.encode("an")[0])
    check(mixed(*mixes.make(tmp_path, config), pairs=(*tiny.PAIRS, tiny.PAIRS[2], tiny.PAIRS[0])))


def test_half_types_keep_small_gradients(tmp_path):
    """Pairs so rare that float16 has no number for their gradients; some digits of them are there."""
    base, folders = mixes.make(tmp_path, tiny.llama_config(len(tiny.bpe_tokenizer())))
    wide, half = (mixed(base, folders, compute=compute) for compute in ("float32", "float16"))
    found = []
    for one in (wide, half):
        objective = Objective(one.model, one.scorer, [1.0] * len(tiny.PAIRS))
        objective.weights *= 1e-6
        work = GradientPass(objective)
        work.begin()
        for block in objective.blocks:
            work.head_block(*block)
        for layer in (2, 1, 0):
            gradient = work.layer(layer)["model.layers.0.mlp.up_proj.weight".replace("0", str(layer))]
        found.append(gradient.double() / work.scale)
    assert 0 < float(found[0].abs().max()) < 1e-7
    torch.testing.assert_close(found[1], found[0], rtol=0.1, atol=0.1 * float(found[0].abs().max()))


@pytest.mark.parametrize(
    "here, beside, kept", [(0, 0, []), (1, 0, [0]), (3, 0, [0, 2, 4]), (4, 0, [0, 2, 4]), (2, 3, [0, 1, 2, 3, 4])]
)
def test_hidden_states_are_kept_evenly_where_room_is_short(here, beside, kept):
    hidden = torch.zeros(1, 10, 4)
    entrances = ActivationCheckpoints(
        Budget(cache=here * hidden.nbytes * 2, cache_beside=beside * hidden.nbytes * 2), 5, 20
    )
    for text in (0, 1):
        for layer in range(5):
            entrances.keep(layer, text, hidden + layer)
    for layer in reversed(range(5)):
        before = [one for one in kept if one <= layer]
        found, tensor = entrances.last_before(layer, 1)
        assert found == (before[-1] if before else 0)
        assert tensor is None if not before else float(tensor[0, 0, 0]) == before[-1]
        entrances.drop(layer)
    assert entrances.last_before(4, 0) == (0, None)
