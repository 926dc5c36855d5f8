"""Keys by --set: the same as the file would have them, and what is said of wrong ones."""

import pytest
import yaml

from modules.config.load import load_config
from modules.runtime.errors import ConfigError


@pytest.fixture
def folders(place):
    for name in ("base", "one"):
        (place / name).mkdir()
    return place


def document(**changes):
    return {
        "directories": {"model_path1": "base", "output_directory": "out"},
        "models_to_merge": ["one"],
        "bad_phrases": [{"phrase": "spine", "contexts": ["down her "]}],
        **changes,
    }


def load(sets=(), content=None, **more):
    text = content if isinstance(content, str) else yaml.safe_dump(content or document())
    with open("my.yaml", "w", encoding="utf-8") as file:
        file.write(text)
    return load_config("my.yaml", sets=sets, **more)


@pytest.mark.parametrize(
    "sets, changes",
    [
        (["merge_ratios=0.5", "dtype=float16"], {"merge_ratios": 0.5, "dtype": "float16"}),
        (["dtype=float16", "dtype=bfloat16"], {"dtype": "bfloat16"}),
        (
            ["joint.steps=3", "joint.step_size=0.5", "search=joint"],
            {"search": "joint", "joint": {"steps": 3, "step_size": 0.5}},
        ),
        (["drift_weight="], {}),
        (
            ["template.enable_thinking=false", "template.a.b=x=y"],
            {"template": {"enable_thinking": False, "a": {"b": "x=y"}}},
        ),
        (["bad_phrases=[{phrase: a, contexts: [b, c]}]"], {"bad_phrases": [{"phrase": "a", "contexts": ["b", "c"]}]}),
    ],
    ids=str,
)
def test_a_key_that_is_set_is_as_if_it_stood_in_the_file(folders, sets, changes):
    ours, theirs = load(sets), load(content=document(**changes))
    assert ours == theirs


def test_a_section_keeps_its_other_keys(folders):
    joint = {"steps": 7, "step_size": 0.5}
    assert (
        load(["joint.steps=3"], document(joint=joint)).joint
        == load(content=document(joint={**joint, "steps": 3})).joint
    )
    assert load(["directories.output_directory=other"]).directories.output_directory == "other"


def test_options_of_their_own_come_after(folders):
    config = load(["device=cuda", "directories.output_directory=here"], device="cpu", output="there")
    assert (config.device, config.directories.output_directory) == ("cpu", "there")


WRONG = {
    "merge_ratios": "--set merge_ratios: expected KEY=VALUE, such as drift_weight=2 or ",
    "joint.=3": "--set joint.: expected KEY=VALUE",
    "joint.step=5": "--set joint.step: unknown key; did you mean 'steps'?",
    "jiont.steps=5": "jiont: unknown key; did you mean 'joint'?",
    "merge_ratios=[0.1, 7]": "--set merge_ratios[1]: 7: ",
    "merge_ratios=[0.1": "--set merge_ratios: not valid YAML at line 1, column 5: ",
    "template={a: 1, a: 2}": "--set template: not valid YAML at line 1, column 8: the key 'a' is listed twice",
    "models_to_merge.0=one": "--set models_to_merge.0: models_to_merge is not a mapping",
    "directories.model_path1.x=1": "--set directories.model_path1.x: model_path1 is not a mapping",
    "models_to_merge=[one, nowhere]": "--set models_to_merge[1]: 'nowhere': no such folder",
    "bad_phrases=[{phrase: a, contexts: [b], weight: -1}]": "--set bad_phrases[0].weight: -1: ",
    "phrase_files=[gone.yaml]": "--set phrase_files[0]: gone.yaml: no such file",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_with_it_names_the_option_and_no_line(folders, text):
    with pytest.raises(ConfigError) as caught:
        load([text])
    first, line = str(caught.value).splitlines()
    assert first == "my.yaml has 1 error:" and line.startswith(f"  {WRONG[text]}") and "(line" not in line


def test_errors_of_the_file_and_of_the_command_line_are_told_together(folders):
    with pytest.raises(ConfigError) as caught:
        load(["dtype=int8", "nothing"], document(strategy="none", directories={"output_directory": "out"}))
    told = str(caught.value).splitlines()
    assert told[0] == "my.yaml has 4 errors:"
    begins = ["--set nothing: ", "directories.model_path1: missing", "strategy: 'none': ", "--set dtype: 'int8': "]
    assert [line[2:].startswith(begin) for line, begin in zip(told[1:], begins, strict=True)] == [True] * 4
