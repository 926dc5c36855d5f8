"""What a config.json asks to be fetched: nothing is, and the key is named."""

import json
import shutil

import pytest
import tiny
import transformers.modeling_utils
from adapters import make_bench
from runs import refused

from modules.checkpoints.architecture import settle_attention, without_weights
from modules.checkpoints.checkpoint import open_checkpoint
from modules.checkpoints.config_file import check_stated
from modules.runtime.errors import ConfigError

KERNEL = "kernels-community/some-kernel@0123abcd"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return make_bench(tmp_path_factory.mktemp("bench"))


def changed(bench, folder, **settings):
    """A copy of a model with other settings in its config.json."""
    shutil.copytree(bench / "one", folder)
    tiny.edit_checkpoint(folder, **settings)
    return folder


# Settings, and the key that is named.
ASKS = [
    ({"attn_implementation": KERNEL}, "attn_implementation"),
    ({"attn_implementation": f"paged|{KERNEL}"}, "attn_implementation"),
    ({"attn_implementation": 5}, "attn_implementation"),
    ({"attn_implementation": ["sdpa", KERNEL]}, "attn_implementation"),
    ({"attn_implementation": {"": "sdpa", "text_config": {"": KERNEL}}}, "attn_implementation"),
    ({"vision_config": {"encoder": {"_attn_implementation": KERNEL}}}, "vision_config.encoder._attn_implementation"),
    ({"layers": [{"attn_implementation": KERNEL}]}, "layers.attn_implementation"),
    ({"_experts_implementation": "sonicmoe"}, "_experts_implementation"),
    ({"text_config": {"experts_implementation": {"": "sonicmoe"}}}, "text_config.experts_implementation"),
    ({"use_kernels": True}, "use_kernels"),
    ({"kernel_config": {"RMSNorm": KERNEL}}, "kernel_config"),
    ({"vision_config": {"backbone": "some/model"}}, "vision_config.backbone"),
    ({"vision_config": {"architecture": "hf_hub:some/model"}}, "vision_config.architecture"),
]
HARMLESS = [
    {"attn_implementation": "eager", "_attn_implementation": None, "experts_implementation": "grouped_mm"},
    {"attn_implementation": {"": "sdpa", "vision_config": "eager", "text_config": None}},
    {"attn_implementation": "flash_attention_2", "_attn_implementation_autoset": True},
    {"cache_implementation": "hybrid", "use_kernels": False, "kernel_config": None, "backbone": "resnet50"},
    {"architectures": ["LlamaForCausalLM"], "vision_config": {"architecture": "mobilenetv5_300m_enc"}},
    {"auto_map": {"AutoConfig": "some/model--configuration.Config"}},  # no code is run at all
]


@pytest.mark.parametrize("settings, key", ASKS, ids=[json.dumps(settings) for settings, _ in ASKS])
@pytest.mark.parametrize("trusted", [False, True])
def test_what_would_be_fetched_is_refused_by_its_key(settings, key, trusted):
    with pytest.raises(ValueError, match=rf"^{key} is "):
        check_stated(settings, trusted)


@pytest.mark.parametrize("settings", HARMLESS, ids=map(json.dumps, HARMLESS))
def test_what_is_here_is_not_refused(settings):
    check_stated(settings, trusted=False)


def test_code_of_another_repository_is_not_trusted_with_a_model():
    for name in ("some/model--configuration.Config", ["some/model--tokenizer.Fast", None]):
        with pytest.raises(ValueError, match=r"^auto_map is "):
            check_stated({"auto_map": {"AutoConfig": name}}, trusted=True)
    check_stated({"auto_map": {"AutoConfig": "configuration.Config"}}, trusted=True)


@pytest.mark.parametrize("number", [0, 1])
def test_a_run_is_refused_for_a_base_or_a_candidate(bench, place, capsys, number):
    folders = [shutil.copytree(bench / name, place / name) for name in ("base", "one")]
    tiny.edit_checkpoint(folders[number], attn_implementation=KERNEL)
    refused(place, folders, capsys, [f"{folders[number]}: config.json", "attn_implementation", KERNEL], "--dry-run")


def test_a_key_that_the_file_makes_up_for_an_implementation(bench, tmp_path):
    """attribute_map says which name stands for which, and a file can bring one along."""
    folder = changed(bench, tmp_path / "one", attribute_map={"mine": "_attn_implementation"}, mine=KERNEL)
    with pytest.raises(ConfigError, match=f"one: config.json.*{KERNEL}"):
        open_checkpoint(folder, "one")


def test_flash_attention_that_is_not_installed_is_not_fetched(bench, tmp_path, monkeypatch):
    """Where the package kernels is installed, transformers fetches it instead."""
    fetched = []
    monkeypatch.setattr(transformers.modeling_utils, "is_kernels_available", lambda: True)
    monkeypatch.setattr(transformers.modeling_utils, "lazy_import_flash_attention", lambda *a, **k: fetched.append(a))
    checkpoint = open_checkpoint(changed(bench, tmp_path / "one", attn_implementation="flash_attention_2"), "one")
    said = settle_attention(checkpoint)
    assert len(said) == 1 and "flash_attention_2" in said[0]
    without_weights(checkpoint)
    assert fetched == []
    checkpoint.config._attn_implementation = "flash_attention_2"
    without_weights(checkpoint)
    assert fetched  # which is what it does where nobody keeps it from it
