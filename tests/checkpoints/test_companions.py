"""Which files beside a base's weights are in the output: those that belong to a model, and nothing else."""

import os
import re
import shutil
from pathlib import Path

import pytest
import tiny
import transformers
from huggingface_hub import constants
from runs import log_of
from safetensors.torch import load_file
from transformers import AutoTokenizer

import merge_monster
from modules.checkpoints.companions import belongs, find_companions
from modules.checkpoints.weight_files import LARGEST_TEXT

MODELS_OWN = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.4.0.0.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "additional_chat_templates/tools.jinja",
    "qwen.tiktoken",
    "LICENSE",
    "LICENSE.txt",
    "license-mit",
    "COPYING.LESSER",
    "NOTICE",
    "Licence.md",
    "USE_POLICY.md",
    "THIRD_PARTY_NOTICES.txt",
]
SOMEBODYS = [
    "credentials.json",
    "client_secret.json",
    "hf_token.txt",
    "train_log.txt",
    "upload_to_hub.py",
    "modeling.py",
    "notes.md",
    "diary.txt",
    "trainer_state.json",
    "adapter_config.json",
    "configuration.json",
    "vocab_extra.txt",
    "license_key.txt",
    "LICENSE.key",
    "license.json",
    "additional_chat_templates/notes.txt",
    "additional_chat_templates/.x.jinja",
    "other/tokenizer.json",
    "chat_template.jinja.bak",
    ".vault.json",
    ".env",
    "README.md",
    "tokenizer.model.swp",
    "config.json~",
    "settings.yaml",
    "model.safetensors",
    "tokenizer",
]


@pytest.mark.parametrize("trust", [False, True])
def test_names(tmp_path, trust):
    for name in (*MODELS_OWN, *SOMEBODYS):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    found = find_companions(tmp_path, trust)
    assert found.sizes == found.published == dict.fromkeys(found.sizes, 2) and set(found.sizes) == set(MODELS_OWN)
    assert {"credentials.json", "hf_token.txt", "license_key.txt"} <= set(found.others)
    assert not {".vault.json", "README.md", "model.safetensors"} & set(found.others)


def test_whatever_the_tokenizers_of_transformers_read_belongs_to_a_model():
    stated = set()
    for file in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        for names in re.findall(r"VOCAB_FILES_NAMES = \{(.*?)\}", file.read_text(encoding="utf-8"), re.DOTALL):
            stated.update(re.findall(r':\s*"([^"]+)"', names))
    assert len(stated) > 20 and [name for name in stated if not belongs(name)] == []


# ---------------------------------------------------------------------------------------------------------------------
# Links and other things that are no plain files
# ---------------------------------------------------------------------------------------------------------------------


def plain(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    return path


def in_cache(place, name="models--org--model"):
    return plain(place / "hub" / name / "blobs/abc")


LINKS = {  # what tokenizer.json leads to -> whether it is copied; None: it is not even read
    "a file in the folder": (lambda place, model: plain(model / "other/real.json"), True),
    "the hub's cache": (lambda place, model: in_cache(place), True),
    "another cache": (lambda place, model: plain(place / "cache/models--org--model/blobs/abc"), False),
    "a data set in the hub's cache": (lambda place, model: in_cache(place, "datasets--org--model"), False),
    "elsewhere": (lambda place, model: plain(place / "diary.txt"), False),
    "a folder that only begins alike": (lambda place, model: plain(place / "model-private/tokenizer.json"), False),
    "a device": (lambda place, model: Path("/dev/zero"), None),
    "nothing": (lambda place, model: place / "gone", None),
    "itself": (lambda place, model: model / "tokenizer.json", None),
    "a folder": (lambda place, model: place, None),
}


@pytest.mark.parametrize("kind", LINKS)
def test_links(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    make, is_copied = LINKS[kind]
    model = tmp_path / "model"
    model.mkdir()
    target = make(tmp_path, model)
    (model / "step.json").symlink_to(target)
    (model / "tokenizer.json").symlink_to("step.json")  # of two links the last counts
    (tmp_path / "alias").symlink_to(model)
    for folder in (model, tmp_path / "alias"):
        found = find_companions(folder, False)
        assert ("tokenizer.json" in found.sizes) == (is_copied is not None)
        assert ("tokenizer.json" in found.published) == bool(is_copied)
        assert found.lacking == (["tokenizer.json"] if is_copied is False else [])


def test_a_snapshot_of_any_cache(tmp_path):
    snapshot, blob = tmp_path / "models--org--model/snapshots/abc", tmp_path / "models--org--model/blobs/def"
    for file in (blob, snapshot / "chat_template.json", tmp_path / "models--org--other/blobs/abc"):
        plain(file)
    (snapshot / "config.json").symlink_to("../../blobs/def")
    (snapshot / "NOTICE").symlink_to("../../../models--org--other/blobs/abc")
    found = find_companions(snapshot, False)
    assert set(found.published) == {"config.json", "chat_template.json"} and found.external_links == ["NOTICE"]


def test_what_is_no_plain_file_or_far_too_large(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.model")
    (tmp_path / "vocab.json").mkdir()
    plain(tmp_path / "LICENSE")
    os.truncate(tmp_path / "LICENSE", LARGEST_TEXT + 1)
    found = find_companions(tmp_path, False)
    assert found.sizes == {} and found.others == ["LICENSE"]


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(models, tmp_path):
    return shutil.copytree(models[0], tmp_path / "base")


def write(place, base, candidates, **more):
    more = {"merge_ratios": [0.5], "merge_headers": False, **more}
    return str(tiny.write_config(place / "my.yaml", base, candidates, place / "out", **more))


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


OWN = {"merge_monster.yaml", "merge_monster_recipe.json", "merge_monster_journal.jsonl", "README.md"}


def test_the_output_has_what_belongs_and_the_log_says_so(place, base, models):
    belonging = files_of(base) | {"LICENSE", "additional_chat_templates/tools.jinja"}
    for name in ("LICENSE", "additional_chat_templates/tools.jinja"):
        plain(base / name)
    for name in ("credentials.json", ".vault.json", "upload.py"):
        (base / name).write_text("PRIVATE")
    (place / "diary.txt").write_text("PRIVATE")
    (base / "NOTICE").symlink_to(place / "diary.txt")
    (place / "letters").mkdir()
    (place / "letters/letter.jinja").write_text("PRIVATE")
    (base / "additional_chat_templates/letter.jinja").symlink_to(place / "letters/letter.jinja")
    assert merge_monster.main(["--config", write(place, base, models[1:2])]) == 0
    replay = ["--replay", "out", "--output", "again", "--source", f"one={models[1]}"]
    assert merge_monster.main(replay) == 0
    for folder in (place / "out", place / "again"):
        published = {name for name in files_of(folder) if not name.endswith((".svg", ".png"))}
        assert published - OWN == belonging
        assert not any(b"PRIVATE" in (folder / name).read_bytes() for name in belonging)
        AutoTokenizer.from_pretrained(folder)
    log = log_of(place)
    assert re.search("Copied from the base: .*LICENSE.*, config.json, .*tokenizer.json", log)
    assert "Not copied (not part of a model): credentials.json, upload.py\n" in log
    links = "links out of the base's folder): NOTICE, additional_chat_templates/letter.jinja\n"
    assert log.count(links) == 2 and log.index(links) < log.index("Candidate 1/1")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_an_output_that_could_not_be_opened_is_refused_before_the_search(place, base, models, capsys, name):
    shutil.move(base / name, place / name)
    (base / name).symlink_to(place / name)
    assert merge_monster.main(["--config", write(place, base, models[1:2])]) == 2
    error = capsys.readouterr().err
    assert f"{name} is a link out of this folder" in error and str(place) in error


CODE = {
    "configuration_own.py": "from transformers import LlamaConfig\n\n\n"
    "class Own(LlamaConfig):\n    model_type = 'own'\n",
    "modeling_own.py": "from transformers import LlamaForCausalLM\nfrom .helper import Own\n\n\n"
    "class OwnModel(LlamaForCausalLM):\n    config_class = Own\n    notes = 'own_vocabulary.txt'\n",
    "helper.py": "from .configuration_own import Own\n",
}


@pytest.mark.parametrize("trust", [True, False])
def test_code_goes_along_only_where_it_is_trusted(place, base, models, trust):
    one = shutil.copytree(models[1], place / "one")
    auto_map = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    for folder in (base, one):
        tiny.edit_checkpoint(folder, auto_map=auto_map, **({"model_type": "own"} if trust else {}))
        for name, code in {**CODE, "upload_to_hub.py": "", "own_vocabulary.txt": "", "notes.txt": ""}.items():
            (folder / name).write_text(code)
    assert merge_monster.main(["--config", write(place, base, [one], trust_remote_code=trust)]) == 0
    added = {*CODE, "own_vocabulary.txt"} if trust else set()
    assert {*CODE, "upload_to_hub.py", "own_vocabulary.txt", "notes.txt"} & files_of(place / "out") == added
    if not trust:
        return
    replay = ["--replay", str(place / "out/merge_monster_recipe.json"), "--output", "again"]
    replay += ["--trust-remote-code", "--source", str(base.parent)]
    assert merge_monster.main(replay) == 0
    theirs, ours = (load_file(place / name / "model.safetensors") for name in ("out", "again"))
    assert all(theirs[name].equal(ours[name]) for name in theirs)
    assert files_of(place / "again") - {"merge_monster_journal.jsonl"} == files_of(place / "out") - {
        "merge_monster_journal.jsonl"
    }
