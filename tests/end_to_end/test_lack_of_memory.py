"""Memory that runs out anywhere in a search, once or twice, in one process or in one of two: the same decisions."""

import json
import multiprocessing
import shutil
from dataclasses import replace

import pytest
import tiny
import torch
from broken_runs import JOURNAL, break_off, journal
from runs import digest, log_of
from torch import distributed
from transformers import AutoTokenizer

import merge_monster
from modules.checkpoints.candidate import open_candidate
from modules.checkpoints.checkpoint import open_checkpoint
from modules.config.load import load_config
from modules.config.phrase_lists import Pair
from modules.config.schema import Mapper
from modules.mapper.detokenize import Detokenizer
from modules.model.loading import load_model
from modules.run.map import explore
from modules.run.merge import build_shared_scorer
from modules.runtime.console import WorkerConsole
from modules.runtime.distributed import ALONE, Group, Rank
from modules.scoring.budget import Budget
from modules.scoring.scorer import Scorer
from modules.scoring.tokenization import encode_pairs
from modules.search.search import Search

# What takes memory in a search: products, what is moved to a device, what is merged into, merges, comparisons.
HUNGRY = (
    (torch.nn.functional, "linear"),
    (torch.Tensor, "to"),
    (torch, "empty_like"),
    (torch, "lerp"),
    (torch.Tensor, "any"),
    (torch, "cat"),
)
OPENINGS = ("", "The apple: ", "Question. ", "Filled with ")
PAIRS = [
    Pair("BAD", phrase, opening + context, 1.0)
    for phrase, context in (("anticipation", "Her body quivers with "), ("spine", "It sent shivers down her "))
    for opening in OPENINGS
]
SETTINGS = {"merge_ratios": [0.1, 0.3, 0.5], "merge_method": ["lerp", "slerp"]}


class Hungry:
    """Counts what takes memory, and has none for what has one of some numbers."""

    def __init__(self, patch):
        self.count, self.failing, self.exchanging = 0, frozenset(), False
        for name in ("all_reduce", "all_gather_object", "broadcast_object_list"):
            patch.setattr(distributed, name, self._exchange(getattr(distributed, name)))
        for owner, name in HUNGRY:
            patch.setattr(owner, name, self._counting(getattr(owner, name)))

    def _counting(self, real):
        def counting(*arguments, **keywords):
            self.count += not self.exchanging
            if not self.exchanging and self.count in self.failing:
                raise torch.OutOfMemoryError(f"number {self.count}")
            return real(*arguments, **keywords)

        return counting

    def _exchange(self, real):
        """What processes tell each other is a few kilobytes on the host, for which there is always memory."""

        def exchange(*arguments, **keywords):
            self.exchanging = True
            try:
                return real(*arguments, **keywords)
            finally:
                self.exchanging = False

        return exchange

    def fails_at(self, *numbers):
        self.count, self.failing = 0, frozenset(numbers)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("models"), tiny.bpe_tokenizer()
    base = tiny.make_model(folder / "base", tiny.llama_config(len(tokenizer), layers=3, hidden=16), tokenizer)
    return base, tiny.make_candidate(folder / "one", base, seed=6), tiny.make_candidate(folder / "two", base, seed=5)


@pytest.fixture
def hungry(monkeypatch):
    return Hungry(monkeypatch)


class Opened:
    """Models and settings, read once for many searches."""

    def __init__(self, folders, place):
        self.base, *others = folders
        self.config = load_config(
            tiny.write_config(place / "my.yaml", self.base, others, place / "out", PAIRS, **SETTINGS)
        )
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.others = others

    def search(self, hungry, *failing, group=ALONE, candidates=None, budget=None):
        """Decisions and the model's tensors of a search in which memory runs out so."""
        hungry.fails_at()
        model = load_model(open_checkpoint(self.base, "base"), "cpu", "float32")
        others = [open_checkpoint(folder, folder.name) for folder in self.others[:candidates]]
        encoded = encode_pairs(self.tokenizer, self.config.pairs, model.vocabulary, model.max_tokens)
        hungry.fails_at(*failing)
        scorer = build_shared_scorer(model, encoded, budget or Budget(), None, group)
        state = Search(model, scorer, self.config, self.tokenizer, group)
        found = [d for one in others for d in state.candidate(open_candidate(one, model.checkpoint, model.module))]
        hungry.failing = frozenset()
        return found, {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def assert_same(found, expected):
    """The same decisions and weights; totals may differ in what rounding does to them."""
    assert [(d.model, d.layer, d.method, d.ratio) for d in found[0]] == [
        (d.model, d.layer, d.method, d.ratio) for d in expected[0]
    ]
    assert [d.after for d in found[0]] == pytest.approx([d.after for d in expected[0]], rel=1e-4)
    assert all(torch.equal(found[1][name], tensor) for name, tensor in expected[1].items())


def troubles(count, every):
    """Numbers that fail: each `every`th alone, and with one that follows at once or a little later."""
    for turn, number in enumerate(range(1, count + 1, every)):
        yield (number, *[()[:0], (number + 1,), (number + 5,), (number + 40, number + 41)][turn % 4])


def check_everywhere(hungry, folders, place, every, candidates):
    opened = Opened(folders, place)
    expected = opened.search(hungry, candidates=candidates)
    count = hungry.count
    # Else much could go wrong without a trace.
    assert {d.layer for d in expected[0] if d.ratio is not None} >= {1, 2, None} and count > 1000
    for failing in troubles(count, every):
        assert_same(opened.search(hungry, *failing, candidates=candidates), expected)


def test_memory_that_runs_out_anywhere_changes_no_decision(hungry, folders, place):
    check_everywhere(hungry, folders, place, 131, 1)


@pytest.mark.slow
def test_memory_that_runs_out_everywhere_changes_no_decision(hungry, folders, place):
    check_everywhere(hungry, folders, place, 7, 2)


# ---------------------------------------------------------------------------------------------------------------------
# The mapper
# ---------------------------------------------------------------------------------------------------------------------


def shown(trees):
    """What is in completion trees, to five digits."""
    return [
        [(branch.tokens, branch.length, pytest.approx(branch.joint, abs=1e-5)) for branch in tree.branches]
        for tree in trees
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout, every", [("forest", 97), ("rows", 97), pytest.param("forest", 5, marks=pytest.mark.slow)]
)
def test_memory_that_runs_out_anywhere_changes_no_map(hungry, folders, place, monkeypatch, layout, every):
    """With kept keys and values, and with everything computed anew."""
    opened = Opened(folders, place)
    config = replace(opened.config, mapper=Mapper(prob_min=2, top_k=3, max_depth=3, additional_length=3))
    model = load_model(open_checkpoint(opened.base, "base"), "cpu", "float32")
    if layout == "rows":
        monkeypatch.setattr("modules.mapper.next_tokens.attention_window", lambda model: 0)
    detokenizer = Detokenizer(opened.tokenizer, model.vocabulary)

    def mapped(*failing):
        hungry.fails_at(*failing)
        return explore(config, WorkerConsole(0), model, opened.tokenizer, detokenizer)[0]

    expected = mapped()
    count = hungry.count
    assert count > 500 and sum(len(tree.branches) for tree in expected) > 5
    for failing in troubles(count, every):
        assert shown(mapped(*failing)) == shown(expected), failing


# ---------------------------------------------------------------------------------------------------------------------
# One of two processes
# ---------------------------------------------------------------------------------------------------------------------


def work_along(number, folders, place, troubles, candidates, results):
    """One of two processes: the same searches, in which memory runs out as `troubles` say, by process."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{place}/store", rank=number, world_size=2)
    with pytest.MonkeyPatch.context() as patch:
        hungry, opened = Hungry(patch), Opened(folders, place / str(number))
        for failing in troubles:
            group = Group(Rank(number, 2, number, 2))
            decisions, tensors = opened.search(hungry, *failing[number], group=group, candidates=candidates)
            results.put((number, failing, decisions, {name: tensor.numpy() for name, tensor in tensors.items()}))
    distributed.destroy_process_group()


def in_two_processes(folders, place, troubles, candidates):
    """What both found, trouble by trouble: decisions and tensors from each."""
    context = multiprocessing.get_context("fork")
    results, found = context.Queue(), {failing: {} for failing in troubles}
    (place / "0").mkdir(), (place / "1").mkdir()
    processes = [
        context.Process(target=work_along, args=(number, folders, place, troubles, candidates, results))
        for number in (0, 1)
    ]
    for process in processes:
        process.start()
    try:
        for _ in range(2 * len(troubles)):
            number, failing, decisions, tensors = results.get(timeout=20)
            found[failing][number] = decisions, {name: torch.from_numpy(values) for name, values in tensors.items()}
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    return found


@pytest.mark.parametrize("every, candidates", [(331, 1), pytest.param(29, 2, marks=pytest.mark.slow)])
def test_memory_that_runs_out_in_one_of_two_processes_changes_no_decision(hungry, folders, place, every, candidates):
    (place / "alone").mkdir()
    expected = Opened(folders, place / "alone").search(hungry, candidates=candidates)
    # By turns in the first process, in the second one, and once in both: packs can't be halved much more often.
    numbers = list(troubles(hungry.count, every))
    turns = [[(one, ()), ((), one), (one[:1], one[-1:])][turn % 3] for turn, one in enumerate(numbers)]
    for failing, found in in_two_processes(folders, place, turns, candidates).items():
        assert found.keys() == {0, 1}, failing
        for decisions, tensors in found.values():
            assert_same((decisions, tensors), expected)


# ---------------------------------------------------------------------------------------------------------------------
# A run that goes on
# ---------------------------------------------------------------------------------------------------------------------


def merge(place, folders, *arguments):
    base, *others = folders
    path = tiny.write_config(place / "my.yaml", base, others[:1], place / "out", PAIRS, **SETTINGS)
    return merge_monster.main(["--config", str(path), *arguments])


@pytest.fixture(scope="module")
def troubled(folders, tmp_path_factory):
    """The output of a run that had no memory at its third decision, and took smaller packs from there on."""
    place, own, count = tmp_path_factory.mktemp("troubled"), Scorer.score_trials, []

    def short_of_memory(self, trials):
        count.append(1)
        if len(count) in (3, 4):
            raise torch.OutOfMemoryError("no memory here")
        return own(self, trials)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(Scorer, "score_trials", short_of_memory)
        assert merge(place, folders) == 0
    return place / "out"


def change_packing(place, change):
    """Change what the journal of an unfinished run says of packs."""
    file = place / "out.partial" / JOURNAL
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for record in records:
        if "packing" in record:
            change(record)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_packs_that_were_halved_stay_so_when_a_run_goes_on(place, folders, troubled):
    records = journal(troubled)
    packs = [record["packing"]["tokens"] for record in records if "packing" in record]
    assert packs[0] == packs[2] > packs[3] == packs[-1]
    for count in (8, len(records) - 1):
        assert records[count - 1]["packing"]["tokens"] == packs[-1]
        break_off(place, troubled, count)
        assert merge(place, folders, "--resume") == 0
        assert "may differ" not in log_of(place)
        for ours, theirs in zip(journal(place / "out"), records, strict=True):
            same = {key for key in ours.keys() | theirs.keys() if ours.get(key) == theirs.get(key)}
            assert (ours.keys() | theirs.keys()) - same <= {"seconds"}
        assert digest(place / "out")["model.safetensors"] == digest(troubled)["model.safetensors"]
        shutil.rmtree(place / "out")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda record: record["packing"].update(layout="rows"), "phrases were scored as rows of"),
        (lambda record: record["packing"].update(tokens=1 << 20), "phrases were scored as forest of 1,048,576 tokens"),
    ],
    ids=["another layout", "not enough memory"],
)
def test_packs_that_can_not_be_had_again_are_a_warning(place, folders, troubled, change, words):
    break_off(place, troubled, 7)
    change_packing(place, change)
    assert merge(place, folders, "--resume") == 0
    assert f"WARNING: {words}" in log_of(place) and "the last digits may differ" in log_of(place)


def test_packs_that_are_none_are_damage(place, folders, troubled, capsys):
    break_off(place, troubled, 7)
    change_packing(place, lambda record: record["packing"].update(tokens="many"))
    assert merge(place, folders, "--resume") == 2
    assert "line 4 is damaged" in capsys.readouterr().err
