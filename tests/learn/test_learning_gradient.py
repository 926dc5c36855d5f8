"""The gradient of packs and passages on an adapter's weights, against plain forwards of one text at a time."""

import learning
import mixes
import pytest
import tiny
import torch
from architectures import configuration

from modules.config.phrase_lists import Pair
from modules.learn import gradient
from modules.scoring.budget import Budget

ANY_OF = Pair("BAD", "any of", "Her body quivers with ", variants=("anticipation", "determination", "anticipating"))


def keeping(forward, *args, use_reentrant, preserve_rng_state, **kwargs):
    """What stands in the place of torch's checkpoint: nothing is computed again."""
    return forward(*args, **kwargs)


def check(folder, pairs=(0, 2, 3, 4), passages=((0, 2), (1, 0)), **more):
    """Every gradient is that of the twin. What is computed again is so outside of InDouble, so nothing is."""
    one = learning.begun(folder, **more)
    with mixes.InDouble(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient, "checkpoint", keeping)
        passages = passages[: len(one.objective.texts)]
        found, loss = one.objective.gradient(pairs, passages)
        total, drift, whole, expected = learning.plain_gradient(folder, one, pairs, passages)
        for text, numbers in zip(one.objective.texts, passages, strict=True):
            assert one.objective.drift(text, numbers) == pytest.approx(drift[text.name], rel=1e-8)
    assert (loss.total, loss.loss) == pytest.approx((total, whole), rel=1e-8)
    assert loss.drift == pytest.approx(drift, rel=1e-8)
    size = max(float(own.abs().max()) for own in expected.values())
    assert size > 1e-3
    for (name, own), here in zip(expected.items(), found, strict=True):
        torch.testing.assert_close(here, own, rtol=1e-8, atol=1e-8 * size, msg=name)


def make_base(folder, name="Llama"):
    tokenizer = tiny.bpe_tokenizer()
    return tiny.make_model(folder / "base", configuration(name, len(tokenizer)), tokenizer, scale=3.0)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Gemma 2", "BLOOM", "Mixtral", "OPT", "Phi", "Cohere 2"])
def test_it_is_that_of_plain_forwards(tmp_path, name):
    """And keeping all activations changes no bit of it."""
    base = make_base(tmp_path, name)
    check(base)
    objective = learning.begun(base, compute="float32").objective
    found = objective.gradient((1, 2), ((0,), (1,)))
    objective._forwards = {}
    objective._run = gradient._keeping_activations
    kept = objective.gradient((1, 2), ((0,), (1,)))
    assert found[1] == kept[1] and all(map(torch.equal, found[0], kept[0]))


def test_in_small_packs_and_few_logits_at_a_time(tmp_path):
    """And of phrases with variants."""
    check(make_base(tmp_path), pairs=range(6), pairs_of=(*tiny.PAIRS, ANY_OF), budget=Budget(tokens=20, logits=1))


def test_without_texts(tmp_path):
    check(make_base(tmp_path), texts=())


def test_pairs_and_places_together_weigh_what_the_pairs_did(tmp_path):
    """Three places of the first three pairs, each of weight 1."""
    one = learning.begun(make_base(tmp_path), pairs_of=tiny.PAIRS[:4])
    alone = learning.begun(tmp_path / "base", pairs_of=tiny.PAIRS[:4], texts=())
    before = alone.objective.weights
    factor = sum(map(abs, before)) / sum(map(abs, [*before, *before[:3]]))
    assert one.objective.weights == pytest.approx([factor * weight for weight in before])


def test_half_types_keep_small_gradients(tmp_path):
    """Pairs so rare that float16 has no number for their gradients; most digits of them are there."""
    base, found = make_base(tmp_path), []
    for compute in ("float32", "float16"):
        one = learning.begun(base, texts=(), compute=compute)
        one.objective.weights = [weight * 1e-6 for weight in one.objective.weights]
        found.append(torch.cat([own.flatten() for own in one.objective.gradient(range(5), ())[0]]))
    assert 0 < float(found[0].abs().max()) < 1e-5
    torch.testing.assert_close(found[1], found[0], rtol=0.1, atol=0.1 * float(found[0].abs().max()))
