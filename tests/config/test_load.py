"""Every kind of wrong input, with its key, value and line; all errors together; nothing heavy imported."""

import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from project import ROOT

from modules.config.load import load_config, output_directory
from modules.config.phrase_lists import Pair
from modules.config.schema import Mapper
from modules.runtime.errors import ConfigError

PHRASES = [{"phrase": "spine", "contexts": ["down her "]}]


@pytest.fixture
def folders(place):
    for name in ("base", "one", "two", "models/fooo"):
        (place / name).mkdir(parents=True)
    return place


def write(drop=(), **changes):
    document = {
        "directories": {"model_path1": "base", "output_directory": "out"},
        "models_to_merge": ["one"],
        "bad_phrases": PHRASES,
        **changes,
    }
    for key in drop:
        del document[key]
    Path("my.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    return "my.yaml"


def errors_of(path, **overrides):
    """What is said, without the first line, which counts the errors."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, **overrides)
    first, *lines = str(caught.value).splitlines()
    assert not lines or first == f"{path} has {len(lines)} error{'s' if len(lines) > 1 else ''}:"
    return "\n".join(line.removeprefix("  ") for line in lines) or first


def test_defaults(folders):
    config = load_config(write())
    assert config.merge_ratios == (0.2, 0.4, 0.6, 0.8)
    assert config.merge_method == ("lerp",)
    assert (config.strategy, config.strategy_threshold, config.auto_weights) == ("cumulative", 0.6, False)
    assert (config.device, config.dtype, config.merge_headers, config.random_seed) == ("auto", "auto", True, 512)
    assert config.pairs == (Pair("BAD", "spine", "down her ", 1.0),)
    assert config.directories.model_directory is None
    with pytest.raises(AttributeError):
        config.dtype = "float16"


def test_keys_of_every_kind(folders):
    path = write(
        device="cuda:1",
        random_seed=7,
        models_to_merge=["two", "one"],
        merge_ratios=[0, 0.5, 1],
        merge_method=["slerp", "cyclic"],
        merge_headers=False,
        strategy="quantitative",
        drift_weight="auto",
        good_phrases=[{"phrase": "yes", "weight": 2, "contexts": ["a", {"context": "b", "weight": 5}, ""]}],
        mapper={"prob_min": 0.5, "top_k": 1, "max_depth": 9, "additional_length": 0, "max_branches": 4},
        joint=None,
    )
    config = load_config(path)
    assert config.models_to_merge == ("two", "one")
    assert config.merge_ratios == (0.0, 0.5, 1.0)
    assert config.merge_method == ("slerp", "cyclic")
    assert (config.strategy, config.drift_weight, config.joint.steps) == ("quantitive", "auto", 25)
    assert config.good_phrases == (Pair("GOOD", "yes", "a", 2), Pair("GOOD", "yes", "b", 5), Pair("GOOD", "yes", "", 2))
    assert config.device == "cuda:1" and not config.merge_headers
    assert config.mapper == Mapper(0.5, 1, 9, 0, 4, None)


@pytest.mark.parametrize(
    "text, number",
    [("1e-3", 0.001), ("5E-1", 0.5), ("1.5e-1", 0.15), ("0.25", 0.25), ("1", 1.0)],
)
def test_a_number_may_be_written_with_an_exponent(folders, text, number):
    Path("more.yaml").write_text(f"bad_phrases: [{{phrase: x, weight: {text}, contexts: [y]}}]")
    config = load_config(write(phrase_files=["more.yaml"]), sets=[f"merge_ratios=[{text}]", f"max_drift={text}"])
    assert (config.merge_ratios, config.max_drift, config.pairs[1].weight) == ((number,), number, number)


def test_what_the_mapper_and_scores_do_without(folders):
    directories = {"model_path1": "base"}
    path = write(directories=directories, models_to_merge=["absent"])
    assert load_config(path, mapping=True).models_to_merge == ("absent",)
    assert load_config(path, scored=["two"]).models_to_merge == ("two",)
    assert "--score[0]: 'absent': " in errors_of(path, scored=["absent"])
    assert "models_to_merge[0]: 'absent': " in errors_of(path)
    assert "directories.output_directory: missing" in errors_of(path)
    assert load_config(write(directories=directories, drop=["models_to_merge"]), mapping=True).pairs
    path = write(drop=["bad_phrases"], phrase_files=[])
    assert load_config(path, mapping=True, discovering=True).pairs == ()
    assert "bad_phrases, good_phrases: both are empty" in errors_of(path, mapping=True)


def test_options_replace_the_file(folders):
    path = write(device="cuda", directories={"model_path1": "gone"})
    config = load_config(path, device="cpu", output="elsewhere", model="two")
    directories = config.directories
    assert (config.device, directories.output_directory, directories.model_path1) == ("cpu", "elsewhere", "two")
    lines = errors_of(path, output="/", model="nowhere", device="gpu").splitlines()
    assert [line.split(":")[0] for line in lines] == ["--model", "--output", "--device"]
    assert not any("(line" in line for line in lines)


@pytest.mark.parametrize(
    "written, layers",
    [
        ("0 - 1", (0, 1)),
        (3, (3,)),
        ("3", (3,)),
        ([0, 3, "8-10"], (0, 3, 8, 9, 10)),
        (["5-6", 2, "4-5"], (2, 4, 5, 6)),
        (None, None),
    ],
    ids=str,
)
def test_layers(folders, written, layers):
    config = load_config(write(layers=written))
    assert config.layers == layers and config.layers_in(32) == (layers or tuple(range(32)))


@pytest.mark.parametrize("written", ["8-", "10-8", -1, 1.5, True, [], [[1]], "1,2", "123456", "٣"], ids=str)
def test_what_are_no_layers(folders, written):
    assert errors_of(write(layers=written)).startswith("layers: ")


def test_layers_that_the_base_does_not_have(folders):
    with pytest.raises(ConfigError, match=r"layers: 4, 8-10: the base has 4 layers, 0 to 3"):
        load_config(write(layers=[3, 4, "8-10"])).layers_in(4)


# Each row: changes to a good file, and how the only line of the message begins.
WRONG = [
    ({"device": "gpu"}, "device: 'gpu': expected auto, cpu, cuda"),
    ({"dtype": "fp16"}, "dtype: 'fp16': Input should be 'auto', 'float16', 'bfloat16' or 'float32'"),
    ({"random_seed": -1}, "random_seed: -1: Input should be greater than or equal to 0"),
    ({"merge_ratios": [0.2, 1.5]}, "merge_ratios[1]: 1.5: Input should be less than or equal to 1"),
    ({"merge_ratios": []}, "merge_ratios: []: "),
    ({"merge_ratios": ["half"]}, "merge_ratios[0]: 'half': Input should be a valid number"),
    ({"merge_ratios": [float("nan")]}, "merge_ratios[0]: nan: Input should be a finite number"),
    ({"merge_method": "slurp"}, "merge_method[0]: 'slurp': expected one of lerp, slerp, "),
    ({"merge_method": {"name": "ties", "dense": 0.5}}, "merge_method[0]: {'dense': 0.5, 'name': 'ties'}: ties has no"),
    (
        {"merge_method": {"name": "dare", "density": 2}},
        "merge_method[0]: {'density': 2, 'name': 'dare'}: dare, density",
    ),
    ({"merge_method": {"density": 0.5}}, "merge_method[0]: {'density': 0.5}: expected one of lerp"),
    ({"strategy": "best"}, "strategy: 'best': expected one of cumulative, all_phrases, quantitive"),
    ({"strategy_threshold": 0}, "strategy_threshold: 0: Input should be greater than 0"),
    ({"min_gain": "much"}, "min_gain: 'much': expected auto or a number of at least 0"),
    ({"auto_weights": 1}, "auto_weights: 1: expected true or false"),
    ({"mapper": {"top_k": "1e1"}}, "mapper.top_k: '1e1': Input should be a valid integer"),
    ({"mapper": {"max_dept": 5}}, "mapper.max_dept: unknown key; did you mean 'max_depth'?"),
    ({"merge_ratio": [0.5]}, "merge_ratio: unknown key; did you mean 'merge_ratios'?"),
    ({"zzz": 1}, "zzz: unknown key; known keys: directories, "),
    ({"models_to_merge": "one"}, "models_to_merge: 'one': expected a list"),
    ({"models_to_merge": ["one", 3]}, "models_to_merge[1]: 3: expected text (put it in quotes)"),
    ({"models_to_merge": []}, "models_to_merge: no candidates"),
    ({"models_to_merge": ["org/name@"]}, "models_to_merge[0]: 'org/name@': no such folder; "),
    ({"models_to_merge": ["~nosuchuser/x"]}, "models_to_merge[0]: '~nosuchuser/x': no such folder"),
    ({"tokenizer": "nowhere"}, "tokenizer: 'nowhere': no such folder"),
    ({"bad_phrases": []}, "bad_phrases, good_phrases: both are empty"),
    ({"bad_phrases": "spine"}, "bad_phrases: 'spine': expected a list"),
    ({"bad_phrases": [{"phrase": "x", "weight": float("inf"), "contexts": ["y"]}]}, "bad_phrases[0].weight: inf: "),
    ({"phrase_files": "x.yaml"}, "phrase_files: 'x.yaml': expected a list"),
    (
        {"phrase_files": ["more/p.yaml"], "bad_phrases": []},
        "phrase_files[0]: more/p.yaml: no such file; ",
    ),
    ({"phrase_files": ["a\0b"]}, "phrase_files[0]: a\0b: can't be read"),
    ({"directories": {"model_path1": "base"}}, "directories.output_directory: missing"),
    ({"directories": {"output_directory": "o"}}, "directories.model_path1: missing"),
    ({"template": ["a"]}, "template: ['a']: expected a mapping of names to values"),
    ({"template": {"x": float("nan")}}, "template: {'x': nan}: expected text, numbers"),
    (
        {"search": "joint", "merge_method": "slerp"},
        "search: joint supports only strategy: cumulative and merge_method: le",
    ),
    ({"search": "joint", "neutral_texts": [], "own_texts": []}, "neutral_texts: empty, but drift_weight"),
]


@pytest.mark.parametrize("changes, begin", WRONG, ids=[begin[:50] for _, begin in WRONG])
def test_a_wrong_value_is_named(folders, changes, begin):
    told = errors_of(write(**changes))
    assert told.startswith(begin) and "\n" not in told


@pytest.mark.parametrize("template", ["{today: 2026-11-26}", "&a {x: *a}"])
def test_settings_that_no_template_can_have(folders, template):
    Path("my.yaml").write_text(f"{Path(write()).read_text()}template: {template}\n")
    assert errors_of("my.yaml").startswith("template: ")


LINES = """\
directories:
  model_path1: base
  model_directry: base
models_to_merge:
  - one
  - nowhere
dtpe: auto
merge_ratios:
  - 0.5
  - 7
shared: &shared
  weight: much
bad_phrases:
  - phrase: x
    contexts: [y]
  - <<: *shared
    phrase: z
    contexts:
      - a
      - {context: b, wait: 3}
phrase_files:
  - absent.yaml
  - more.yaml
"""


def test_every_error_of_all_files_is_told_with_its_line(folders):
    Path("more.yaml").write_text("good_phrases:\n- phrase: x\n  contexts:\n  - y\n  - 3\n")
    Path("my.yaml").write_text(LINES)
    found = [re.fullmatch(r"(.+?): .*?( \(line .+\))?", line) for line in errors_of("my.yaml").splitlines()]
    assert {(match[1], match[2]) for match in found} == {
        ("directories.model_directry", " (line 3)"),
        ("directories.output_directory", " (line 1)"),
        ("models_to_merge[1]", " (line 6)"),
        ("dtpe", " (line 7)"),
        ("merge_ratios[1]", " (line 10)"),
        ("shared", " (line 11)"),
        ("bad_phrases[1].weight", " (line 12)"),
        ("bad_phrases[1].contexts[1].wait", " (line 20)"),
        ("phrase_files[0]", " (line 22)"),
        ("phrase_files[1] (more.yaml).good_phrases[0].contexts[1].context", " (line 5 of that file)"),
    }


def test_phrase_files_are_added(folders):
    Path("more.yaml").write_text(yaml.safe_dump({"bad_phrases": [{"phrase": "x", "contexts": ["y"]}]}))
    whole = Path(write(good_phrases=PHRASES)).rename("whole.yaml")  # a whole configuration may be one
    config = load_config(write(drop=["bad_phrases"], phrase_files=["more.yaml", str(whole)]))
    assert [(pair.kind, pair.phrase) for pair in config.pairs] == [("BAD", "x"), ("BAD", "spine"), ("GOOD", "spine")]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", ": nothing: expected a mapping of keys to values"),
        ("- phrase: x\n  contexts: [y]", ": [{'contexts': ['y'], 'phrase': 'x'}]: expected a mapping"),
        ("phrase_files: [b.yaml]", ".phrase_files: a phrase file can't include others"),
        ("bad_phrase: []", ".bad_phrase: unknown key; did you mean 'bad_phrases'?"),
    ],
)
def test_phrase_files_that_are_none(folders, text, message):
    Path("more.yaml").write_text(text)
    assert errors_of(write(phrase_files=["more.yaml"])).startswith(f"phrase_files[0] (more.yaml){message}")


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [1, 2", "not valid YAML at line 1"),
        ("a: 1\n\tb: 2", "not valid YAML at line 2"),
        ("- just\n- a list", "the file: ['just', 'a list']: expected a mapping of keys to values"),
        ("", "directories.model_path1: missing"),
        ("dtype: auto\ndtype: float16", "the key 'dtype' is listed twice"),
        ("3: 1", "3: unknown key"),
        ('x: "\\ud800"', "not valid YAML at line 1, column 4: this contains half of a character"),
        ("x: " + "[" * 1000, "not valid YAML"),
    ],
)
def test_files_that_are_no_configuration(place, text, message):
    Path("my.yaml").write_text(text)
    assert message in errors_of("my.yaml")


def test_files_that_cannot_be_read(place):
    assert "absent.yaml: no such file" in errors_of("absent.yaml")
    assert "can't be read" in errors_of(".")
    Path("latin.yaml").write_bytes("phrase: caf\xe9".encode("latin-1"))
    assert "not a UTF-8 text file" in errors_of("latin.yaml")


def seconds_of_children():
    """Of the processor, which others that are busy do not change."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def test_help_and_errors_answer_in_under_a_second(folders):
    for arguments, code, words in (
        (["--help"], 0, "--config FILE"),
        (["--config", write(dtype="int4")], 2, "ERROR: "),
        (["--confg", "x"], 2, "unrecognized arguments"),
    ):
        start = seconds_of_children()
        command = [sys.executable, str(ROOT / "merge_monster.py"), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == code
        assert words in result.stdout + result.stderr
        assert "Traceback" not in result.stderr
        assert seconds_of_children() - start < 1.0


def test_a_wrong_key_of_the_mapper_ends_it_before_any_work(folders):
    command = [sys.executable, str(ROOT / "monster_mapper.py"), "--config", write(mapper={"top_k": 0})]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "mapper.top_k: 0: " in result.stderr and not Path("logs").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Short files that stand for much, and long ones
# ---------------------------------------------------------------------------------------------------------------------


def lists(entries, contexts):
    """Phrase lists of so many pairs, in a short file."""
    shared = f"[{', '.join(['a'] * contexts)}]"
    return f"bad_phrases:\n- &entry\n  phrase: x\n  contexts: {shared}\n" + "- *entry\n" * (entries - 1)


MERGES = "x0: &x0 {a0: 1}\n" + "".join(f"x{i}: &x{i} {{<<: *x{i - 1}, a{i}: 1}}\n" for i in range(1, 2200))
LEVELS = "l0: &l0 [a, a]\n" + "".join(f"l{i}: &l{i} [*l{i - 1}, *l{i - 1}]\n" for i in range(1, 40))
BOMBS = {
    "pairs in millions": (lists(3000, 3000), "expands to more than 2,000,000 values"),
    "merge keys": (MERGES, "expands to more than 2,000,000 values"),
    "lists of lists": (LEVELS, "expands to more than 2,000,000 values"),
    "pairs": (lists(251, 400), "100,401 pairs of a phrase and a context"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_short_file_that_stands_for_too_much_is_refused_at_once(folders, name):
    """As a phrase file, which is read as the main one is."""
    text, words = BOMBS[name]
    Path("more.yaml").write_text(text)
    path = write(phrase_files=["more.yaml"])
    began = time.process_time()
    with pytest.raises(ConfigError, match=words):
        load_config(path)
    assert time.process_time() - began < 2


def test_of_very_many_errors_the_first_ones_are_told(place):
    Path("my.yaml").write_text("".join(f"key{i}: 1\n" for i in range(200)))
    with pytest.raises(ConfigError) as error:
        load_config("my.yaml")
    first, *lines, last = str(error.value).splitlines()
    assert first == "my.yaml has 203 errors:" and len(lines) == 50 and last == "  and 153 more"


# ---------------------------------------------------------------------------------------------------------------------
# Paths
# ---------------------------------------------------------------------------------------------------------------------

OUTPUTS = {
    "/": "the root of a file system",
    "a" * 250: "invalid path",
    "\u65e5" * 80: "invalid path",
    "a" * 300: "invalid path",
    "a\0b": "invalid path",
    "~nobody-of-this-name/out": "invalid path",
    "loop/out": "invalid path",
    " ": "expected text",
}


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda text: repr(text[:12]))
def test_an_output_that_cannot_be_one_is_refused(folders, output):
    (folders / "loop").symlink_to("loop")
    assert OUTPUTS[output] in errors_of(write(directories={"model_path1": "base", "output_directory": output}))
    with pytest.raises(ConfigError, match=f"--output: .*{OUTPUTS[output]}"):
        output_directory("--output", output)


@pytest.mark.parametrize("output, found", [(".", "here"), ("..", "above"), ("x/..", "here"), ("x/../y", "x/../y")])
def test_an_output_without_a_name_of_its_own_is_named(place, monkeypatch, output, found):
    here = place / "above" / "here"
    (here / "x").mkdir(parents=True)
    monkeypatch.chdir(here)
    assert output_directory("--output", output) == {"here": here, "above": here.parent}.get(found, Path(found))


@pytest.mark.parametrize("name", ["org/name", "models/foo@main", "org/name+models/fooo"])
def test_what_can_only_be_the_hubs_is_taken(folders, name):
    assert load_config(write(models_to_merge=[name])).models_to_merge == (name,)
