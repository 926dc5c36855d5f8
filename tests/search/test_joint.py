"""Joint search: its steps, where they begin and end, broken off and gone on with, in several processes."""

import json
import threading
from dataclasses import asdict

import mixes
import pytest
import tiny
import torch
from mixes import InDouble, mixed

from modules.runtime.distributed import Group, Rank
from modules.runtime.errors import CheckpointError, ConfigError, ProcessLost
from modules.scoring.budget import Budget
from modules.scoring.drift import DriftMeter, full_passage
from modules.scoring.gradient import GradientPass
from modules.scoring.objective import Objective, Penalty
from modules.search.joint import (
    Joint,
    JointState,
    first_weights,
    given_weights,
    largest_factor,
    moved,
    rounded,
    start_of,
    step_size,
)


def walked(gradient, start, steps, size=0.08):
    """Shares behind so many steps along a gradient that is a function of all shares."""
    state = JointState.at(start)
    for step in range(1, steps + 1):
        slopes = gradient(state.weights)
        rows = [moved(state, row, slopes[row], step_size(step, steps, size)) for row in range(len(start))]
        state = JointState(step, *zip(*rows, strict=True))
    return state.weights


@pytest.mark.parametrize("start", [0.02, 0.98])
def test_a_known_optimum_is_found(start):
    """Of a bowl that is a hundred times as steep one way as the other; where its bottom is out of bounds, there."""
    goals, steepness = [[0.3, 0.9], [-0.5, 1.7], [0.0, 0.5]], [[1.0, 100.0], [1.0, 1.0], [0.01, 10.0]]

    def gradient(shares):
        return [
            [2 * c * (a - g) for a, g, c in zip(*row, strict=True)]
            for row in zip(shares, goals, steepness, strict=True)
        ]

    found = walked(gradient, [[start] * 2] * 3, 40)
    for ours, theirs in zip(found, [[0.3, 0.9], [0.0, 1.0], [0.0, 0.5]], strict=True):
        assert ours == pytest.approx(theirs, abs=0.02)


def test_a_step_is_that_of_adam():
    steps, start = 7, [[0.5, 0.1, 0.9]]
    slopes = [[[0.3 * (step - 3), -2.0, 1e-9]] for step in range(steps)]
    given = iter(slopes)
    found = walked(lambda _shares: next(given), start, steps)
    shares = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([shares], lr=0.08, betas=(0.8, 0.95), eps=1e-12)
    for step in range(steps):
        adam.param_groups[0]["lr"] = 0.08 * (1 - 0.9 * step / (steps - 1))
        shares.grad = torch.tensor(slopes[step], dtype=torch.float64)
        adam.step()
        with torch.no_grad():
            shares.clamp_(0, 1)
    assert found[0] == pytest.approx(shares[0].tolist(), rel=1e-12)


def test_where_steps_begin():
    assert first_weights(2, [1.0, 1.5, 1.0]) == ((0.02, 0.02),) * 2  # of equals the base
    assert first_weights(3, [1.0, 1.5, 0.9]) == ((0.0, 0.98),) * 3
    assert [round(step_size(step, 3, 0.08), 6) for step in (1, 2, 3)] == [0.08, 0.044, 0.008]
    assert step_size(1, 1, 0.08) == 0.08


@pytest.mark.parametrize("outside", [True, False])
def test_an_end_is_a_start_for_another(outside):
    rows = ((0.3, 0.0), (0.3, 0.25), (0.0, 0.5), (0.3, 0.0))
    start = start_of(rows, outside)
    assert given_weights(start, 4, 2) == rows
    assert len(start) == 3 + outside  # 0.3 everywhere and its exception, or 0.3 in some layers


def test_what_is_kept_has_two_decimals():
    assert rounded([[0.126, 0.0099], [1.0, 0.5049]]) == ((0.13, 0.0), (1.0, 0.5))
    assert rounded([[0.5, 0.03]], 0.3) == ((0.15, 0.0),)


@pytest.mark.parametrize("limit, expected", [(1.0, 1.0), (0.25, 0.5), (0.1, 0.3162), (0.0, 0.0)])
def test_the_largest_factor_that_holds(limit, expected):
    tried = []

    def is_allowed(factor):
        tried.append(factor)
        return factor * factor <= limit

    found = largest_factor(is_allowed)
    assert expected - 2**-7 <= found <= expected and len(tried) <= 8
    assert is_allowed(found) and (found in tried[:-1] or found == 0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return mixes.make(tmp_path_factory.mktemp("joint"), tiny.llama_config(len(tiny.bpe_tokenizer()), tied=True))


def bits(one):
    return {name: tensor.clone() for name, tensor in one.model.module.state_dict().items()}


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_gone_on_with_after_any_step_it_gives_the_same_bits(llama, compute):
    one = mixed(*llama, compute=compute, budget=Budget(tokens=20))
    joint, state = Joint(one.mix, one.objective, 4), JointState.at([[0.02, 0.02]] * one.mix.rows)
    joint.go_to(state)
    passed = []
    for _ in range(4):
        before = json.dumps(asdict(state))
        state, value = joint.step(state)
        passed.append((before, state, value, bits(one)))
    assert state.step == 4 and len({row for _, after, *_ in passed for row in after.weights}) > 4
    for before, after, value, weights in passed:
        again = mixed(*llama, compute=compute, budget=Budget(tokens=20))
        other, stored = Joint(again.mix, again.objective, 4), JointState.of(json.loads(before))
        other.go_to(stored)
        assert other.step(stored) == (after, value)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in bits(again).items())


def test_the_objective_falls(llama):
    one = mixed(*llama, compute="float32")
    joint, state = Joint(one.mix, one.objective, 12), JointState.at([[0.02, 0.02]] * one.mix.rows)
    at_base = joint.value().objective
    joint.go_to(state)
    values = []
    for _ in range(12):
        state, value = joint.step(state)
        values.append(value.objective)
    last = joint.value().objective
    assert last < min(values) and last < at_base and values[0] == pytest.approx(at_base, rel=0.1)
    one.mix.compose(rounded(state.weights), exact=True)
    value = joint.value()
    assert value.objective == pytest.approx(last, rel=0.02)
    assert value.log_probabilities == pytest.approx(one.scorer.score(), rel=1e-5)
    kl = value.metrics["kl"]
    assert kl == pytest.approx(one.meter.measure().divergence, rel=1e-4) and kl > 1e-4


def test_slopes_of_pairs_and_of_penalties_make_the_gradient(llama):
    one = mixed(*llama)
    shares = [[0.3, 0.2]] * one.mix.rows
    with InDouble():
        meters = [
            DriftMeter(one.model, list(map(full_passage, windows)))
            for windows in (mixes.WINDOWS[:1], mixes.WINDOWS[1:])
        ]
        penalties = [Penalty(name, *more) for name, *more in zip("ab", (3.0, 5.0), meters, strict=True)]
        objective = Objective(one.model, one.scorer, one.weights, penalties)
        joint = Joint(one.mix, objective)
        one.mix.compose(shares)
        value, whole = joint.value(), joint.gradient(shares)
        summands = [objective.part(name) for name in (None, "a", "b")]
        parts = [joint.gradient(shares, summand) for summand in summands]
        one.mix.compose(shares, exact=True)
        divergences = [meter.measure().divergence for meter in meters]
    assert list(value.metrics.values()) == pytest.approx(divergences, rel=1e-9) and min(divergences) > 1e-3
    assert [text for summand in summands for text in summand.texts] == objective.texts  # none is read twice
    assert value.objective == pytest.approx(value.total + 3 * divergences[0] + 5 * divergences[1], rel=1e-9)
    for row, *summands in zip(whole, *parts, strict=True):
        assert [sum(slopes) for slopes in zip(*summands, strict=True)] == pytest.approx(row, rel=1e-9)
        assert all(any(slopes) for slopes in summands)


class Together(Group):
    """Processes that are threads: sums wait for each other."""

    def __init__(self, rank, barrier, rows):
        super().__init__(rank)
        self._barrier, self._rows = barrier, rows

    def on_all_ranks(self, work):
        return work()

    def sum(self, rows):
        self._rows[self.rank.number] = torch.tensor(rows, dtype=torch.float64)
        self._barrier.wait()
        total = sum(self._rows.values()).tolist()
        self._barrier.wait()
        return total


def in_processes(llama, processes, work):
    """What work(a mix, its group) returns in each of several processes, and in one that has everything."""
    ranks = [Rank(number, processes) for number in range(processes)]
    alone, *others = (mixed(*llama, budget=Budget(tokens=20), rank=rank) for rank in (Rank(), *ranks))
    barrier, rows, found = threading.Barrier(processes), {}, {}
    assert all(0 < len(one.objective.texts) < len(alone.objective.texts) for one in others)

    def run(one, group):
        with InDouble():
            found[group.rank] = work(one, group)

    groups = [Together(rank, barrier, rows) for rank in ranks]
    threads = [threading.Thread(target=run, args=pair) for pair in zip(others, groups, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    run(alone, Group(Rank()))
    return found.pop(Rank()), [found[rank] for rank in ranks]


def three_steps(one, group):
    joint, state = Joint(one.mix, one.objective, 3, group=group), JointState.at([[0.02, 0.02]] * one.mix.rows)
    joint.go_to(state)
    for _ in range(3):
        state, value = joint.step(state)
    return state, value


@pytest.mark.parametrize("processes", [3])
def test_several_processes_find_what_one_finds(llama, processes):
    (state, value), found = in_processes(llama, processes, three_steps)
    assert all(one == found[0] for one in found)
    for row, other in zip(found[0][0].weights, state.weights, strict=True):
        assert row == pytest.approx(other, abs=1e-6)
    assert found[0][1].log_probabilities == pytest.approx(value.log_probabilities, rel=1e-9)
    assert found[0][1].objective == pytest.approx(value.objective, rel=1e-9)
    assert found[0][1].metrics == pytest.approx(value.metrics, rel=1e-9)


@pytest.mark.parametrize(
    "failure, elsewhere",
    [(torch.OutOfMemoryError("none left"), torch.OutOfMemoryError), (CheckpointError("gone"), ProcessLost)],
)
def test_what_fails_in_one_process_fails_in_all(llama, monkeypatch, failure, elsewhere):
    """Halfway through a step; a lack of memory, after which it can be made again, is told from others."""
    own, failures = GradientPass.layer, []

    def layer(work, number):
        local = work._objective.local_pairs
        if local.sum() < len(tiny.PAIRS) and number == 1 and not failures and local[0]:
            failures.append(failure)
            raise failure
        return own(work, number)

    def work(one, group):
        joint, state = Joint(one.mix, one.objective, group=group), JointState.at([[0.02, 0.02]] * one.mix.rows)
        joint.go_to(state)
        try:
            return joint.step(state)
        except Exception as error:
            joint.go_to(state)
            return type(error), joint.step(state)[0]

    monkeypatch.setattr(GradientPass, "layer", layer)
    (expected, _), found = in_processes(llama, 2, work)
    assert len(failures) == 1 and {kind for kind, _ in found} == {type(failure), elsewhere}
    for _, state in found:
        for row, other in zip(state.weights, expected.weights, strict=True):
            assert row == pytest.approx(other, abs=1e-6)


@pytest.mark.parametrize("compute", ["float64", "bfloat16"])
def test_a_right_backward_is_known(llama, compute):
    one = mixed(*llama, compute=compute)
    joint, shares = Joint(one.mix, one.objective), [[0.02, 0.02]] * one.mix.rows
    joint.go_to(JointState.at(shares))
    joint.check(shares, joint.gradient(shares))
    weights = bits(one)
    joint.go_to(JointState.at(shares))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in bits(one).items())


@pytest.mark.parametrize("method, factor, compute", [("head_block", 0, "float32"), ("layer", -1, "bfloat16")])
def test_a_wrong_backward_is_refused(llama, monkeypatch, method, factor, compute):
    """Layers or head without a gradient; in a half type, which shows no less, with the opposite of theirs."""
    one, own = mixed(*llama, compute=compute), getattr(GradientPass, method)

    def wrong(work, *arguments, **more):
        return {key: factor * tensor for key, tensor in own(work, *arguments, **more).items()}

    monkeypatch.setattr(GradientPass, method, wrong)
    joint = Joint(one.mix, one.objective)
    shares = [[0.02, 0.02]] * one.mix.rows
    joint.go_to(JointState.at(shares))
    gradient = joint.gradient(shares)
    with pytest.raises(ConfigError, match="LlamaForCausalLM: search: joint is not supported"):
        joint.check(shares, gradient)
