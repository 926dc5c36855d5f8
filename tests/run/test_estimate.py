"""How long a run is said to take, against what a search computes; the plan in words."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from plans import GB, GIB, made_up, opened, planned, start
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modules.model.memory import Memory, Sizes
from modules.run import estimate as forecast
from modules.run.estimate import Estimate, Rates, calibrate
from modules.run.plan import Disk
from modules.run.room import Available


@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("headers, layers", [(True, None), (False, None), (True, [0, 2]), (False, 1)])
def test_an_estimate_counts_what_a_search_computes(place, models, headers, layers, guarded):
    (place / "plain.txt").write_text("The bread is on the table. It was baked this morning. " * 20, encoding="utf-8")
    guard = {"max_drift": 9.0, "neutral_texts": [str(place / "plain.txt")], "neutral_tokens": 60} if guarded else {}
    config, found = opened(
        place, models, merge_method=["lerp", "cyclic"], merge_headers=headers, layers=layers, **guard
    )
    search = start(config, found)
    # The counter does not know the fused attention of a CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        assert list(search.candidate(found.candidates[0]))
    free_merges = Rates(1.0, 1.0, 1.0, merging={"lerp": math.inf, "cyclic": math.inf}, reading=None)
    predicted, counted = forecast.estimate(planned(config, found), free_merges).search, counter.get_total_flops()
    # Vectors (norms) are weights too, but no product: a little more is planned than is counted.
    assert counted < predicted < (1.03 if layers is None else 1.06) * counted


def test_rates_are_measured_for_every_method(place, models, monkeypatch):
    monkeypatch.setattr(forecast, "SECONDS_EACH", 0.01)
    plan = planned(*opened(place, models, merge_method=["slerp", "gradient"]))
    assert plan.weight_files == tuple(folder / "model.safetensors" for folder in models[1:])
    rates = calibrate(plan)
    assert list(rates.merging) == ["slerp", "gradient", "lerp"]
    values = [rates.alone, rates.stacked, rates.attention, rates.reading, *rates.merging.values()]
    assert all(0 < value < math.inf for value in values)
    without_attention = replace(plan, sizes=replace(plan.sizes, heads=0))
    assert calibrate(without_attention).attention == math.inf


def test_reading_is_timed_on_the_first_file_that_is_here(place):
    (place / "here").write_bytes(bytes(1000))
    assert forecast._reading_rate(made_up(place, weight_files=(place / "away", place / "here"))) > 0
    assert forecast._reading_rate(made_up(place, weight_files=(place / "away",))) is None


def test_a_measurement_leaves_out_the_first_turn_and_what_interferes(monkeypatch):
    now, durations = [0.0], iter([50.0, 1.0, 9.0, 1.1, 1.2, 100.0, 1.0, 1.0])

    def work():
        now[0] += next(durations)

    monkeypatch.setattr(forecast, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(forecast, "SECONDS_EACH", 20.0)
    assert forecast.seconds_each(work, torch.device("cpu")) == pytest.approx(1.1)
    assert next(durations) == 1.0  # it ended with the turn that used the time up


def test_an_estimate_is_the_work_over_the_rates(place):
    sizes = Sizes(2, 10, 20, 3, 4, 100, 1000, 500, 4000)
    plan = made_up(
        place, sizes=sizes, methods=(("lerp", 3),), header_ratios=3, pairs=32, text_tokens=80, packs=(25,), columns=5
    )
    plan = replace(plan, disk=Disk(600, (("one", 600), ("two", 300)), 0, 0, 0))
    found = forecast.estimate(plan, Rates(10.0, 100.0, attention=2.0, merging={"lerp": 50.0}, reading=3.0))
    layer, attention, head = 2 * 25 * 500, 4 * 25 * 25 * (3 * 4), 2 * 5 * 10 * 100
    alone, stacked = 2 * 3 + 2 * 3 + 2 * 2, 3  # searched layers, header, cache and a whole forward; the second layer
    products = (alone * layer + 4 * head) / 10 + (stacked * layer + 6 * head) / 100
    merges = 4 * 2 * 1000 + 4 * 4000
    assert found.search == pytest.approx(products + (alone + stacked) * attention / 2 + merges / 50)
    assert found.total == pytest.approx(2 * found.search + (600 + 600 + 300) / 3)
    unknown = forecast.estimate(plan, Rates(10.0, 100.0, 2.0, {"lerp": 50.0}, None))
    assert unknown.total == pytest.approx(2 * found.search)


@pytest.mark.parametrize("header", [0, 1], ids=["layers only", "header too"])
def test_a_joint_search_goes_back_to_the_first_layer_that_is_mixed(place, header):
    sizes = Sizes(4, 10, 20, 0, 4, 100, 1000, 500, 0)
    plan = made_up(place, sizes=sizes, methods=(), header_ratios=0, packs=(25,), columns=0, steps=4)
    plan = replace(plan, memory=replace(plan.memory, header=header))
    rates = Rates(1.0, 1.0, math.inf, {"lerp": 1000.0}, None)
    one_layer = 25 * 2 * 500  # forward; as much for what its weights, or what enters it, have of a gradient
    for layers, mixed, back in ((None, 4, 4), ((2, 3), 2, 4 if header else 2), ((3,), 1, 4 if header else 1)):
        found = forecast.estimate(replace(plan, layers=layers), rates).search
        assert found == pytest.approx(10 * ((4 + 2 * back + mixed) * one_layer + 2 * 2 * mixed))


# ---------------------------------------------------------------------------------------------------------------------
# In words
# ---------------------------------------------------------------------------------------------------------------------

LINES = """\
Candidates       : 2 (one, two)
Layers           : 32 of about 218.1 million weights
Tried            : every layer by lerp at 4 ratios, slerp at 4 ratios, the header at 4
Decisions        : 65 a candidate, 130 in all
Phrases          : 14 pairs, 1,076 tokens packed from 1,207, 2 packs (if the model takes them as a forest, as most do)
Bytes to read    : 16.00 GB of the base, 16.00 GB at most of each candidate, 47.00 GB in all
Bytes to write   : 16.00 GB to out, 900.00 GB free
Memory needed    : 20.00 GiB on cuda:0 (base 15.00 GiB, layers and the header that are searched 4.50 GiB, \
activations about 0.50 GiB), 79.00 GiB free
Downloads        : 31.00 GB still to be fetched from the hub
Time (estimate)  : 10 min a candidate, 21 min in all, without downloads and saving
""".splitlines()


def test_the_plan_in_words(place):
    plan = made_up(place, output=Path("out"))
    plan = replace(plan, disk=replace(plan.disk, downloads=31 * GB))
    room = Available(place, disk=900 * GB, memory=79 * GIB, refusal=None)
    lines = forecast.plan_lines(plan, room, Estimate(612.0, 1240.0))
    assert lines == LINES


def test_the_plan_in_words_where_little_is_known(place):
    plan = made_up(place, device=torch.device("mps"), methods=(("lerp", 4),), header_ratios=0, packs=(76,))
    plan = replace(plan, disk=Disk(200_000, (("one", 150_000),), 200_000, 0, 0))
    plan = replace(plan, memory=Memory(200_000, 1000, 0, 0, 1 << 20))
    room = Available(place, disk=GB, memory=None, refusal=None)
    text = "\n".join(forecast.plan_lines(plan, room, Estimate(7000.0, 7000.0)))
    assert "lerp at 4 ratios\n" in text and "1 pack (" in text and "Downloads" not in text
    assert "0.20 MB of the base, 0.15 MB of each candidate, 0.35 MB in all" in text
    assert "1.19 MiB on mps (base 0.19 MiB, layers that are searched 0.00 MiB, activations about 1.00 MiB)\n" in text
    assert text.endswith(" : 1 h 57 min a candidate, 1 h 57 min in all, without downloads and saving")


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.04, "0.0 s"),
        (9.96, "10.0 s"),
        (42.4, "42 s"),
        (150.0, "2 min"),
        (5900.0, "98 min"),
        (7199.0, "2 h 00 min"),
        (100_000.0, "27 h 47 min"),
        (700_000.0, "8 days 2 h"),
    ],
)
def test_durations(seconds, text):
    assert forecast.duration(seconds) == text


def test_what_is_measured_beside_the_search_is_counted(place):
    plan = made_up(place)
    rates = Rates(1e12, 1e12, math.inf, {"lerp": 1e12, "slerp": 1e12}, None)
    bare = forecast.estimate(plan, rates)
    search = bare.search
    assert bare.watching == 0 and bare.total == 2 * search
    drift = forecast.estimate(replace(plan, neutral_tokens=8000), rates)
    per_token = 2 * 32 * 218.1e6 + 4 * 4096 * 128256
    assert drift.watching == pytest.approx(3 * 8000 * per_token / 1e12)
    whole = forecast.estimate(replace(plan, neutral_tokens=8000, baselines=True), rates)
    phrases = 2 * (1076 * 2 * 32 * 218.1e6 + 40 * 2 * 4096 * 128256)
    assert whole.watching == pytest.approx((5 * 8000 * per_token + phrases) / 1e12)
    assert whole.total == pytest.approx(2 * search + whole.watching)
    room = Available(place, disk=10**12, memory=None, refusal=None)
    assert "for drift and baselines" in "\n".join(forecast.plan_lines(plan, room, whole))
