"""Keys by --set: the same as the file would have them, and what is said of wrong ones."""

import pytest
import yaml

from modules.config import load_config
from modules.runtime import ConfigError


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
        (["merge_ratios=[0.1, 0.3]"], {"merge_ratios": [0.1, 0.3]}),
        (["merge_ratios=0.5", "dtype=float16"], {"merge_ratios": 0.5, "dtype": "float16"}),
        (["dtype=float16", "dtype=bfloat16"], {"dtype": "bfloat16"}),
        (
            ["joint.steps=3", "joint.step_size=0.5", "search=joint"],
            {"search": "joint", "joint": {"steps": 3, "step_size": 0.5}},
        ),
        (["joint={steps: 4}"], {"joint": {"steps": 4}}),
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
    assert vars(ours) | {"text": ""} == vars(theirs) | {"text": ""}
    assert ours.text == yaml.safe_dump(document()) + "".join(f"# --set {text}\n" for text in sets)
    assert vars(load(content=ours.text)) | {"text": ""} == vars(load()) | {"text": ""}  # it is YAML all the same


def test_a_section_keeps_its_other_keys(folders):
    joint = {"steps": 7, "step_size": 0.5}
    assert (
        load(["joint.steps=3"], document(joint=joint)).joint
        == load(content=document(joint={**joint, "steps": 3})).joint
    )
    assert load(["directories.output_directory=other"]).directories.output_directory == "other"


def test_a_file_may_have_nothing_but_phrases(folders):
    content = yaml.safe_dump({"bad_phrases": document()["bad_phrases"]}).rstrip("\n")
    sets = ["directories.model_path1=base", "models_to_merge=[one]"]
    config = load(sets, content, output="out")
    assert config.directories == load().directories and config.text.startswith(f"{content}\n# --set ")


def test_options_of_their_own_come_after(folders):
    config = load(["device=cuda", "directories.output_directory=here"], device="cpu", output="there")
    assert (config.device, config.directories.output_directory) == ("cpu", "there")


def test_what_has_several_lines_is_one_comment(folders):
    config = load(["system=two\n  lines"])
    assert config.text.splitlines()[-1] == "# --set system=two\\n  lines" and config.system == "two lines"


WRONG = {
    "merge_ratios": ["--set merge_ratios: expected KEY=VALUE, such as drift_weight=2 or "],
    "=3": ["--set : expected KEY=VALUE"],
    "joint.=3": ["--set joint.: expected KEY=VALUE"],
    "merge_ratio=0.5": ["--set merge_ratio: unknown key; did you mean 'merge_ratios'?"],
    "joint.step=5": ["--set joint.step: unknown key; did you mean 'steps'?"],
    "jiont.steps=5": ["--set jiont: unknown key; did you mean 'joint'?"],
    "merge_ratios=[0.1, 7]": ["--set merge_ratios: [0.1, 7]: expected a number from 0 to 1"],
    "merge_ratios=[0.1": ["--set merge_ratios: not valid YAML at line 1, column 5: "],
    "template={a: 1, a: 2}": ["--set template: not valid YAML at line 1, column 8: the key 'a' stands twice"],
    "models_to_merge.0=one": ["--set models_to_merge.0: models_to_merge is no mapping of keys to values"],
    "directories.model_path1.x=1": ["directories.model_path1 is no mapping of keys to values"],
    "models_to_merge=[one, nowhere]": ["--set models_to_merge[1]: 'nowhere': no such folder"],
    "bad_phrases=[{phrase: a, contexts: [b], weight: -1}]": ["--set bad_phrases[0].weight: -1: expected a number of"],
    "phrase_files=[gone.yaml]": ["--set phrase_files[0]: gone.yaml: no such file"],
    "min_gain=1e-3": [
        "--set min_gain: '1e-3': expected auto or a number of at least 0; YAML reads this as text: write 0.001"
    ],
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_with_it_names_the_option_and_no_line(folders, text):
    with pytest.raises(ConfigError) as caught:
        load([text])
    told = str(caught.value)
    assert any(words in told for words in WRONG[text]) and "(line" not in told and "1 error:" in told


def test_errors_of_the_file_and_of_the_command_line_are_told_together(folders):
    with pytest.raises(ConfigError) as caught:
        load(["dtype=int8", "nothing"], document(strategy="none", directories={"output_directory": "out"}))
    told = str(caught.value).splitlines()
    assert told[0] == "my.yaml has 4 errors:"
    assert any(line.startswith("  --set dtype: 'int8': expected auto, ") for line in told)
    assert any(line.startswith("  --set nothing: expected KEY=VALUE") for line in told)
    assert any(line.startswith("  strategy: ") and "(line " in line for line in told)
    assert any(line.startswith("  directories.model_path1: missing") for line in told)
