"""Every kind of wrong input, with its message; all errors together; nothing heavy imported."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from project import ROOT

from modules.config import Mapper, Pair, load_config
from modules.config.load import output_directory
from modules.config.schema import json_schema
from modules.runtime import ConfigError

PHRASES = [{"phrase": "spine", "contexts": ["down her "]}]


@pytest.fixture
def folders(tmp_path):
    for name in ("base", "one", "two"):
        (tmp_path / name).mkdir()
    return tmp_path


def write(folder, drop=(), **changes):
    document = {
        "directories": {"model_path1": str(folder / "base"), "output_directory": str(folder / "out")},
        "models_to_merge": [str(folder / "one")],
        "bad_phrases": PHRASES,
        **changes,
    }
    for key in drop:
        del document[key]
    path = folder / "my.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def errors_of(path, **overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, **overrides)
    return str(caught.value)


def test_defaults(folders):
    config = load_config(write(folders))
    assert config.merge_ratios == (0.2, 0.4, 0.6, 0.8)
    assert config.merge_method == ("lerp",)
    assert (config.strategy, config.strategy_threshold, config.auto_weights) == ("cumulative", 0.6, False)
    assert (config.device, config.dtype, config.merge_headers, config.random_seed) == ("auto", "auto", True, 512)
    assert config.pairs == (Pair("BAD", "spine", "down her ", 1.0),)
    assert config.text == (folders / "my.yaml").read_text()
    assert config.directories.model_directory is None


def test_all_keys(folders):
    path = write(
        folders,
        device="cuda:1",
        dtype="bfloat16",
        random_seed=7,
        models_to_merge=[str(folders / "two"), str(folders / "one")],
        merge_ratios=[0, 0.5, 1],
        merge_method=["slerp", "cyclic"],
        merge_headers=False,
        strategy="quantitative",
        strategy_threshold=0.25,
        auto_weights=True,
        good_phrases=[{"phrase": "yes", "weight": 2, "contexts": ["a", {"context": "b", "weight": 5}, ""]}],
        trust_remote_code=True,
        mapper={
            **{"prob_min": 0.5, "top_k": 1, "max_depth": 9, "additional_length": 0},
            **{"max_branches": 4, "min_joint": 0.1},
        },
    )
    config = load_config(path)
    assert config.models_to_merge == (str(folders / "two"), str(folders / "one"))
    assert config.merge_ratios == (0.0, 0.5, 1.0)
    assert config.merge_method == ("slerp", "cyclic")
    assert config.strategy == "quantitive"
    assert config.good_phrases == (Pair("GOOD", "yes", "a", 2), Pair("GOOD", "yes", "b", 5), Pair("GOOD", "yes", "", 2))
    assert config.device == "cuda:1" and config.trust_remote_code and not config.merge_headers
    assert config.mapper == Mapper(0.5, 1, 9, 0, 4, 0.1)


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("prob_min", -1, "-1: expected a number from 0 to 100"),
        ("prob_min", 100.5, "100.5: expected a number from 0 to 100"),
        ("prob_min", "10%", "'10%': expected a number from 0 to 100"),
        ("prob_min", True, "true: expected a number from 0 to 100"),
        ("top_k", 0, "0: expected a whole number of at least 1"),
        ("top_k", -3, "-3: expected a whole number of at least 1"),
        ("top_k", 2.5, "2.5: expected a whole number of at least 1"),
        ("top_k", "many", "'many': expected a whole number of at least 1"),
        ("max_depth", 0, "0: expected a whole number of at least 1"),
        ("max_depth", "deep", "'deep': expected a whole number of at least 1"),
        ("additional_length", -1, "-1: expected a whole number of at least 0"),
        ("additional_length", [20], "[20]: expected a whole number of at least 0"),
        ("max_branches", 0, "0: expected a whole number of at least 1"),
        ("max_branches", "all", "'all': expected a whole number of at least 1"),
        ("max_branches", 2.5, "2.5: expected a whole number of at least 1"),
        ("min_joint", 0, "0: expected a number above 0 and up to 100"),
        ("min_joint", 101, "101: expected a number above 0 and up to 100"),
        ("min_joint", "1%", "'1%': expected a number above 0 and up to 100"),
        ("max_dept", 5, "unknown key; did you mean 'max_depth'?"),
    ],
)
def test_bad_mapper_options(folders, option, value, message):
    assert f"mapper.{option}: {message}" in errors_of(write(folders, mapper={option: value}), mapping=True)


def test_the_mapper_takes_a_config_whose_candidates_and_output_are_not_there_yet(folders):
    directories = {"model_path1": str(folders / "base")}
    absent = [str(folders / "absent")]
    path = write(folders, directories=directories, models_to_merge=absent)
    config = load_config(path, mapping=True)
    assert config.mapper == Mapper(10.0, 3, 5, 20)
    errors = errors_of(path)
    assert "models_to_merge[0]" in errors and "output_directory: missing" in errors
    assert load_config(write(folders, directories=directories, drop=["models_to_merge"]), mapping=True).pairs


def test_another_model_replaces_the_base_even_where_that_is_missing(folders):
    path = write(folders, directories={"model_path1": str(folders / "gone")})
    config = load_config(path, model=str(folders / "two"), mapping=True)
    assert config.directories.model_path1 == str(folders / "two")
    assert "--model: 'nowhere': no such folder" in errors_of(path, model="nowhere", mapping=True)


def test_command_line_replaces_the_file(folders):
    path = write(folders, device="cuda")
    config = load_config(path, device="cpu", output=str(folders / "elsewhere"))
    assert config.device == "cpu"
    assert config.directories.output_directory == str(folders / "elsewhere")
    assert "--device: 'gpu': expected auto, cpu, cuda, cuda:N, xpu, xpu:N or mps" in errors_of(path, device="gpu")


def test_output_on_the_command_line_is_enough(folders):
    path = write(folders, directories={"model_path1": str(folders / "base")})
    assert load_config(path, output="out").directories.output_directory == "out"


@pytest.mark.parametrize(
    "written, layers",
    [
        ("8-10", (8, 9, 10)),
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
    config = load_config(write(folders, layers=written))
    assert config.layers == layers and config.layers_in(32) == (layers or tuple(range(32)))


@pytest.mark.parametrize("written", ["8-", "10-8", -1, 1.5, True, [], ["a"], [[1]], "1,2", {}, "123456", "٣"], ids=str)
def test_what_are_no_layers(folders, written):
    assert "layers: " in errors_of(write(folders, layers=written))


def test_layers_that_the_base_does_not_have(folders):
    with pytest.raises(ConfigError, match=r"layers: 4, 8-10: the base has 4 layers, 0 to 3"):
        load_config(write(folders, layers=[3, 4, "8-10"])).layers_in(4)


def test_phrase_files_are_added(folders):
    (folders / "more.yaml").write_text(
        yaml.safe_dump({"bad_phrases": [{"phrase": "x", "contexts": ["y"]}], "good_phrases": PHRASES})
    )
    config = load_config(write(folders, phrase_files=[str(folders / "more.yaml")]))
    assert [(p.kind, p.phrase) for p in config.pairs] == [("BAD", "spine"), ("BAD", "x"), ("GOOD", "spine")]
    config = load_config(write(folders, drop=["bad_phrases"], phrase_files=[str(folders / "more.yaml")]))
    assert len(config.pairs) == 2


# Each row: changes to a good file, and the line that must be among the errors.
WRONG = [
    ({"device": "gpu"}, "device: 'gpu': expected auto, cpu, cuda, cuda:N, xpu, xpu:N or mps"),
    ({"device": "cpu:1"}, "device: 'cpu:1': expected"),
    ({"device": 3}, "device: 3: expected"),
    ({"dtype": "float61"}, "did you mean 'float16'?"),
    ({"dtype": "fp16"}, "dtype: 'fp16': expected auto, float16, bfloat16 or float32"),
    ({"random_seed": -1}, "random_seed: -1: expected a whole number of at least 0"),
    ({"random_seed": 1.5}, "random_seed: 1.5: expected a whole number"),
    ({"random_seed": True}, "random_seed: true: expected a whole number"),
    ({"merge_ratios": [0.2, 1.5]}, "merge_ratios: [0.2, 1.5]: expected a number from 0 to 1"),
    ({"merge_ratios": [-0.1]}, "merge_ratios: [-0.1]: expected a number from 0 to 1"),
    ({"merge_ratios": []}, "merge_ratios: []: expected at least one value"),
    ({"merge_ratios": ["half"]}, "merge_ratios: ['half']: expected a number from 0 to 1"),
    ({"merge_ratios": [float("nan")]}, "merge_ratios: [nan]: expected a number from 0 to 1"),
    ({"merge_method": "slurp"}, "did you mean 'slerp'?"),
    ({"merge_method": {"name": "tees"}}, "did you mean 'ties'?"),
    ({"merge_method": {"name": "ties", "dense": 0.5}}, "ties has no parameter 'dense'"),
    ({"merge_method": {"name": "dare", "density": 2}}, "dare, density"),
    ({"merge_method": {"density": 0.5}}, "expected lerp"),
    ({"merge_method": ["lerp", 3]}, "merge_method: ['lerp', 3]: expected lerp"),
    ({"merge_headers": "maybe"}, "merge_headers: 'maybe': expected true or false"),
    ({"strategy": "best"}, "strategy: 'best': expected cumulative, all_phrases or quantitive"),
    ({"strategy": ["cumulative"]}, "strategy: ['cumulative']: expected cumulative"),
    ({"strategy_threshold": 0}, "strategy_threshold: 0: expected a number above 0 and up to 1"),
    ({"strategy_threshold": 60}, "strategy_threshold: 60: expected a number above 0 and up to 1"),
    ({"auto_weights": 1}, "auto_weights: 1: expected true or false"),
    ({"trust_remote_code": "no!"}, "trust_remote_code: 'no!': expected true or false"),
    ({"merge_ratio": [0.5]}, "merge_ratio: unknown key; did you mean 'merge_ratios'?"),
    ({"zzz": 1}, "zzz: unknown key; known keys: "),
    ({"models_to_merge": "one"}, "models_to_merge: 'one': expected a list"),
    ({"models_to_merge": ["./nowhere/model"]}, "models_to_merge[0]: './nowhere/model': no such folder"),
    (
        {"models_to_merge": ["org/name@"]},
        "models_to_merge[0]: 'org/name@': no such folder; a model of the hub is written",
    ),
    ({"models_to_merge": ["org/name+nowhere"]}, "models_to_merge[0]: 'org/name+nowhere': no such folder"),
    ({"models_to_merge": ["org/name+~nobody/x"]}, "models_to_merge[0]: 'org/name+~nobody/x': no such folder"),
    ({"keep_downloads": "no"}, "keep_downloads: 'no': expected true or false"),
    ({"models_to_merge": [3]}, "models_to_merge[0]: 3: expected text (put it in quotes)"),
    ({"models_to_merge": []}, "models_to_merge: no candidates; list models here or set directories.model_directory"),
    ({"models_to_merge": None}, "models_to_merge: no candidates"),
    ({"bad_phrases": []}, "bad_phrases, good_phrases: both are empty; there is nothing to score"),
    ({"bad_phrases": None}, "bad_phrases, good_phrases: both are empty"),
    ({"bad_phrases": "spine"}, "bad_phrases: 'spine': expected a list"),
    ({"bad_phrases": ["spine"]}, "bad_phrases[0]: 'spine': expected a mapping of keys to values"),
    ({"bad_phrases": [{"contexts": ["x"]}]}, "bad_phrases[0].phrase: missing"),
    ({"bad_phrases": [{"phrase": "", "contexts": ["x"]}]}, "bad_phrases[0].phrase: '': expected text"),
    ({"bad_phrases": [{"phrase": True, "contexts": ["x"]}]}, "bad_phrases[0].phrase: true: expected text (put it in q"),
    ({"bad_phrases": [{"phrase": "x"}]}, "bad_phrases[0].contexts: missing or empty"),
    ({"bad_phrases": [{"phrase": "x", "contexts": []}]}, "bad_phrases[0].contexts: missing or empty"),
    ({"bad_phrases": [{"phrase": "x", "contexts": "y"}]}, "bad_phrases[0].contexts: 'y': expected a list"),
    ({"bad_phrases": [{"phrase": "x", "contexts": [5]}]}, "bad_phrases[0].contexts[0]: 5: expected text"),
    (
        {"good_phrases": [{"phrase": "x", "contexts": [{"text": "y"}]}]},
        "good_phrases[0].contexts[0].text: unknown key; did you mean 'context'?",
    ),
    (
        {"bad_phrases": [{"phrase": "x", "wieght": 2, "contexts": ["y"]}]},
        "bad_phrases[0].wieght: unknown key; did you mean 'weight'?",
    ),
    (
        {"bad_phrases": [{"phrase": "x", "weight": "much", "contexts": ["y"]}]},
        "bad_phrases[0].weight: 'much': expected a number of at least 0",
    ),
    (
        {"bad_phrases": [{"phrase": "x", "weight": float("inf"), "contexts": ["y"]}]},
        "bad_phrases[0].weight: inf: expected a number of at least 0",
    ),
    ({"phrase_files": ["nowhere.yaml"]}, "phrase_files[0]: nowhere.yaml: no such file"),
    ({"phrase_files": "x.yaml"}, "phrase_files: 'x.yaml': expected a list"),
    ({"models_to_merge": ["~nosuchuser/x"]}, "models_to_merge[0]: '~nosuchuser/x': not a usable path"),
    ({"models_to_merge": ["x" * 300]}, "not a usable path (File name too long)"),
    ({"phrase_files": ["a\0b"]}, "phrase_files[0]: 'a\\x00b': not a usable path"),
    ({"directories": None}, "directories: nothing: expected a mapping"),
    ({"directories": {}}, "directories.model_path1: missing"),
    ({"directories": {}}, "directories.output_directory: missing"),
    ({"directories": {"model_path": "x"}}, "directories.model_path: unknown key; did you mean 'model_path1'?"),
    (
        {"directories": {"model_path1": "nowhere", "output_directory": "o"}},
        "directories.model_path1: 'nowhere': no such",
    ),
]


@pytest.mark.parametrize("changes, line", WRONG, ids=[line[:50] for _, line in WRONG])
def test_wrong_values_are_named(folders, changes, line):
    assert line in errors_of(write(folders, **changes))


def test_all_errors_are_reported_together(folders):
    message = errors_of(write(folders, dtype="int4", merge_ratios=[2], stratgy="cumulative", auto_weights="yes"))
    assert message.splitlines()[0].endswith("my.yaml has 4 errors:")
    assert [line.split(":")[0].strip() for line in message.splitlines()[1:]] == [
        "stratgy",
        "merge_ratios",
        "auto_weights",
        "dtype",
    ]


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


def test_every_error_has_its_line(place):
    for name in ("base", "one"):
        (place / name).mkdir()
    (place / "more.yaml").write_text("good_phrases:\n- phrase: x\n  contexts:\n  - y\n  - 3\n")
    (place / "my.yaml").write_text(LINES)
    found = [re.fullmatch(r"  (.+?): .*?( \(line .+\))?", line) for line in errors_of("my.yaml").splitlines()[1:]]
    assert {(match[1], match[2]) for match in found} == {
        ("directories.model_directry", " (line 3)"),
        ("directories.output_directory", " (line 1)"),
        ("models_to_merge[1]", " (line 6)"),
        ("dtpe", " (line 7)"),
        ("merge_ratios", " (line 8)"),
        ("shared", " (line 11)"),
        ("bad_phrases[1].weight", " (line 12)"),
        ("bad_phrases[1].contexts[1].wait", " (line 20)"),
        ("phrase_files[0]", " (line 22)"),
        ("phrase_files[1] (more.yaml).good_phrases[0].contexts[1]", " (line 5 of that file)"),
    }


def test_a_value_of_the_command_line_has_no_line(folders):
    lines = errors_of(write(folders), output="/", model="nowhere", device="gpu").splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == ["--model", "--output", "--device"]
    assert not any("(line" in line for line in lines)


def test_a_wrong_phrase_in_a_phrase_file_names_the_file(folders):
    (folders / "more.yaml").write_text("bad_phrases:\n  - phrase: x\n")
    message = errors_of(write(folders, phrase_files=[str(folders / "more.yaml")]))
    assert "phrase_files[0] (" in message and "more.yaml).bad_phrases[0].contexts: missing or empty" in message


@pytest.mark.parametrize(
    "text, message",
    [
        ("", ": the file is empty"),
        ("# nothing but a comment", ": the file is empty"),
        ("- phrase: x\n  contexts: [y]", ": a bare list; bad_phrases: or good_phrases: is missing above it"),
        ("phrase_files: [b.yaml]", ".phrase_files: ['b.yaml']: a phrase file can't name others; name them all in the"),
        ("spine", ": 'spine': expected a mapping of keys to values"),
        ("bad_phrase: []", ".bad_phrase: unknown key; did you mean 'bad_phrases'?"),
    ],
)
def test_phrase_files_that_are_none(folders, text, message):
    more = folders / "more.yaml"
    more.write_text(text)
    assert f"  phrase_files[0] ({more}){message}" in errors_of(write(folders, phrase_files=[str(more)]))


def test_a_phrase_file_that_is_not_there(folders, monkeypatch):
    monkeypatch.chdir(folders)
    message = errors_of(write(folders, phrase_files=["more/p.yaml"]))
    expected = (
        "phrase_files[0]: more/p.yaml: no such file. A relative path begins in the folder you start the program in."
    )
    assert expected in message and "--config" not in message


def test_a_whole_config_may_be_a_phrase_file(folders):
    other = write(folders, phrase_files=[]).rename(folders / "other.yaml")
    config = load_config(write(folders, drop=["bad_phrases"], phrase_files=[str(other)]))
    assert config.pairs == (Pair("BAD", "spine", "down her "),)


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [1, 2", "not valid YAML at line 1"),
        ("a: 1\n\tb: 2", "not valid YAML at line 2"),
        ("- just\n- a list", "expected a mapping of keys to values"),
        ("", "directories.model_path1: missing"),
        ("dtype: auto\ndtype: float16", "the key 'dtype' stands twice"),
        ("? [a, b]\n: 1", "not valid YAML"),
        ("x: !!python/object:os.system {}", "not valid YAML"),
        ("3: 1", "3: unknown key"),
        ("&a [*a]", "expected a mapping"),
        ("x: 2024-99-99", "not valid YAML"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, message):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    assert message in errors_of(path)


def test_files_that_cannot_be_read(tmp_path):
    assert "no such file" in errors_of(tmp_path / "absent.yaml")
    assert "can't be read" in errors_of(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("phrase: caf\xe9".encode("latin-1"))
    assert "not a UTF-8 text file" in errors_of(tmp_path / "latin.yaml")


def test_the_config_is_frozen(folders):
    with pytest.raises(AttributeError):
        load_config(write(folders)).dtype = "float16"


def run(*arguments):
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / "merge_monster.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return result, time.perf_counter() - start


def test_help_and_errors_answer_in_under_a_second(folders):
    path = write(folders, dtype="int4")
    for arguments, code, words in (
        (["--help"], 0, "--config FILE"),
        (["--version"], 0, "Merge Monster 1."),
        (["--config", str(path)], 2, "ERROR: "),
        (["--config", "absent.yaml"], 2, "ERROR: absent.yaml: no such file"),
        (["--confg", "x"], 2, "unrecognized arguments"),
    ):
        result, seconds = min((run(*arguments) for _ in range(3)), key=lambda item: item[1])
        assert result.returncode == code
        assert words in result.stdout + result.stderr
        assert "Traceback" not in result.stderr
        assert seconds < 1.0


def test_reading_a_config_imports_nothing_heavy():
    program = "import sys, merge_monster; print(sorted({'torch', 'transformers', 'safetensors'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("option, value", [("prob_min", -1), ("prob_min", 101), ("top_k", "x"), ("max_depth", 0)])
def test_bad_mapper_options_end_the_mapper_with_code_2(folders, option, value):
    path = write(folders, mapper={option: value})
    command = [sys.executable, str(ROOT / "monster_mapper.py"), "--config", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folders, check=False)
    assert result.returncode == 2
    assert f"mapper.{option}: " in result.stderr and "Traceback" not in result.stderr
    assert not (folders / "logs").exists()


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
    "pairs in millions": (lists(3000, 3000), "stands for more than 2,000,000 values"),
    "merge keys": (MERGES, "stands for more than 2,000,000 values"),
    "lists of lists": (LEVELS, "stands for more than 2,000,000 values"),
    "pairs": (lists(251, 400), "100,400 pairs of a phrase and a context; at most 100,000 are taken"),
}


@pytest.mark.parametrize("where", ["the file", "a phrase file", "the mapper"])
@pytest.mark.parametrize("name", BOMBS)
def test_a_short_file_that_stands_for_too_much_is_refused_at_once(place, name, where):
    text, words = BOMBS[name]
    head = f"directories: {{model_path1: {place}, output_directory: out}}\nmodels_to_merge: [{place}]\n"
    if where == "a phrase file":
        (place / "bomb.yaml").write_text(text)
        text = "phrase_files: [bomb.yaml]\n"
    (place / "my.yaml").write_text(head + text)
    began = time.process_time()
    with pytest.raises(ConfigError, match=words):
        load_config("my.yaml", mapping=where == "the mapper")
    assert time.process_time() - began < 2


def test_pairs_are_counted_over_all_files(place):
    for name, entries in (("one", 125), ("two", 125), ("three", 1)):
        (place / f"{name}.yaml").write_text(lists(entries, 400))
    head = f"directories: {{model_path1: {place}, output_directory: out}}\nmodels_to_merge: [{place}]\n"
    (place / "my.yaml").write_text(head + "phrase_files: [one.yaml, two.yaml]\n")
    assert len(load_config("my.yaml").pairs) == 100_000
    (place / "my.yaml").write_text(head + "phrase_files: [one.yaml, two.yaml, three.yaml]\n")
    with pytest.raises(ConfigError, match="100,400 pairs"):
        load_config("my.yaml")


def test_a_list_that_holds_itself_is_refused(place):
    (place / "my.yaml").write_text("bad_phrases: &all [*all]\nmodels_to_merge: &more [*more, {a: *more}]\n")
    with pytest.raises(ConfigError, match="errors"):
        load_config("my.yaml")


def test_of_very_many_errors_the_first_ones_are_told(place):
    (place / "my.yaml").write_text("".join(f"key{i}: 1\n" for i in range(200)))
    with pytest.raises(ConfigError) as error:
        load_config("my.yaml")
    lines = str(error.value).splitlines()
    assert len(lines) == 52 and re.search(r"^  and \d+ more$", lines[-1]) and "errors:" in lines[0]


# ---------------------------------------------------------------------------------------------------------------------
# Paths
# ---------------------------------------------------------------------------------------------------------------------

OUTPUTS = {
    "/": "a whole file system can't be an output",
    "../" * 60: "a whole file system can't be an output",
    "a" * 250: "its name is too long",
    "\u65e5" * 80: "its name is too long",
    "a" * 300: "not a usable path",
    "/".join(["a" * 100] * 60): "not a usable path",
    "a\0b": "not a usable path",
    "~nobody-of-this-name/out": "not a usable path",
    "loop/out": "not a usable path",
    " ": "expected text",
}


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda text: repr(text[:12]))
def test_an_output_that_cannot_be_one_is_refused(place, output):
    (place / "loop").symlink_to("loop")
    write_named(place / "my.yaml", output)
    with pytest.raises(ConfigError, match=OUTPUTS[output]):
        load_config("my.yaml")
    with pytest.raises(ConfigError, match=f"--output: .*{OUTPUTS[output]}"):
        output_directory("--output", output)


@pytest.mark.parametrize("output, found", [(".", "here"), ("..", "above"), ("x/..", "here"), ("x/../y", "x/../y")])
def test_an_output_without_a_name_of_its_own_is_named(place, monkeypatch, output, found):
    here = place / "above" / "here"
    (here / "x").mkdir(parents=True)
    monkeypatch.chdir(here)
    assert output_directory("--output", output) == {"here": here, "above": here.parent}.get(found, Path(found))


def write_named(path, output="out", base=None, candidate=None):
    directories = {"model_path1": str(base or path.parent), "output_directory": output}
    phrases = [{"phrase": "x", "contexts": ["y"]}]
    settings = {"directories": directories, "models_to_merge": [candidate or str(path.parent)], "bad_phrases": phrases}
    path.write_text(yaml.safe_dump(settings))


MISSING = {
    "models/foo": "models is there, foo is not in it; did you mean 'models/fooo'?; the hub's would be written",
    "models/zzz": "models is there, zzz is not in it; the hub's would be written models/zzz@main",
    "./models/foo": "did you mean './models/fooo'?",
    "models/foo/": "did you mean 'models/fooo'?",
    "modles": "did you mean 'models'?",
    "no/such/thing": "a model of the hub is written org/name",
    "models/fooo+models/bat": "did you mean 'models/bar'?",
}


@pytest.mark.parametrize("name", MISSING)
def test_a_folder_that_is_missed_is_not_looked_for_on_the_hub(place, name):
    for folder in ("fooo", "bar"):
        (place / "models" / folder).mkdir(parents=True)
    write_named(place / "my.yaml", candidate=name)
    with pytest.raises(ConfigError, match=re.escape(MISSING[name])):
        load_config("my.yaml")


@pytest.mark.parametrize("name", ["org/name", "models/foo@main", "org/name+models/fooo"])
def test_what_can_only_be_the_hubs_is_taken(place, name):
    (place / "models" / "fooo").mkdir(parents=True)
    write_named(place / "my.yaml", candidate=name)
    assert load_config("my.yaml").models_to_merge == (name,)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that YAML takes for text
# ---------------------------------------------------------------------------------------------------------------------

NUMBERS = [
    ("merge_ratios: [1e-3]", "merge_ratios", "0.001"),
    ("merge_ratios: [1e-5]", "merge_ratios", "1.0e-05"),
    ("merge_ratios: [5E-1, 0.2]", "merge_ratios", "0.5"),
    ("merge_ratios: ['0,5']", "merge_ratios", "0.5"),
    ("strategy_threshold: 1e-1", "strategy_threshold", "0.1"),
    ("mapper: {prob_min: 1e1}", "prob_min", "10.0"),
    ("mapper: {prob_min: 1.5e1}", "prob_min", "15.0"),
    ("mapper: {top_k: 1e1}", "top_k", "10"),
    ("bad_phrases: [{phrase: x, weight: 1e3, contexts: [y]}]", "weight", "1000.0"),
    ("bad_phrases: [{phrase: x, contexts: [{context: y, weight: 2e0}]}]", "weight", "2.0"),
]


@pytest.mark.parametrize("line, key, right", NUMBERS)
def test_a_number_that_yaml_reads_as_text(tmp_path, line, key, right):
    (tmp_path / "my.yaml").write_text(line + "\n")
    with pytest.raises(ConfigError) as refused:
        load_config(tmp_path / "my.yaml")
    assert any(
        key in told and f"YAML reads this as text: write {right}" in told for told in str(refused.value).split("\n")
    )
    (tmp_path / "my.yaml").write_text(f"merge_ratios: [{right}]\n")
    with pytest.raises(ConfigError) as refused:
        load_config(tmp_path / "my.yaml")
    assert "as text" not in str(refused.value)


# ---------------------------------------------------------------------------------------------------------------------
# The schema for editors
# ---------------------------------------------------------------------------------------------------------------------


def test_the_schema_is_the_one_that_the_code_makes():
    """As `python -m modules.run.schema` prints it."""
    made = json.dumps(json_schema(), indent=2) + "\n"
    assert (ROOT / "modules" / "config" / "schema.json").read_text(encoding="utf-8") == made


def test_the_schema_describes_every_key():
    schema = json_schema()
    for name, section in {"": schema, **schema["$defs"]}.items():
        assert section["additionalProperties"] is False
        for key, value in section["properties"].items():
            described = schema["$defs"][value["$ref"].rpartition("/")[2]] if "$ref" in value else value
            assert described["description"], f"{name}.{key}"


@pytest.mark.parametrize(
    "file", [*ROOT.glob("default*.yaml"), *(ROOT / "example_phrases").glob("*.yaml")], ids=lambda file: file.name
)
def test_a_file_that_is_shipped_names_its_schema(file):
    text = file.read_text(encoding="utf-8")
    path, _, fragment = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)[1].partition("#")
    schema = json.loads((file.parent / path).read_text(encoding="utf-8"))
    for name in fragment.split("/")[1:]:
        schema = schema[name]
    document = yaml.safe_load(text)
    assert set(schema.get("required", [])) <= set(document) <= set(schema["properties"])
