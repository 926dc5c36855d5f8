"""Lengths that a stranger's file announces: none is believed before it is held against the file and a limit."""

import json
import os
import resource
import shutil

import pytest
import torch
from adapters import make_bench
from safetensors.torch import save_file

from modules.checkpoints import weight_files
from modules.checkpoints.checkpoint import load_tokenizer, open_checkpoint
from modules.checkpoints.companions import small_files
from modules.checkpoints.lora import read_settings
from modules.checkpoints.weight_files import LARGEST_SETTINGS, open_reader
from modules.runtime.errors import CheckpointError, ConfigError

HUGE = 3 << 30  # bytes; in a sparse file they take no room


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return make_bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture
def little_memory():
    """What is done takes less than a third of a huge file."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # kilobytes


def as_long_as_its_header(file):
    with file.open("wb") as opened:
        opened.write((HUGE - 8).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}')
        opened.truncate(HUGE)


def forms(file):
    return {name: (info.dtype, info.shape) for name, info in open_reader(file.parent, [file.name]).tensors.items()}


READERS = {
    "header": lambda reader: reader.forms(reader.folder / "model.safetensors"),
    "tensor": lambda reader: list(reader.read(["a"])),
    "rows": lambda reader: reader.rows("a", torch.tensor([0])),
}


@pytest.mark.parametrize("name", READERS)
def test_a_header_as_long_as_a_huge_file_is_not_read(tmp_path, little_memory, name):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1)}, file)
    reader = open_reader(tmp_path, [file.name])
    as_long_as_its_header(file)
    with pytest.raises(CheckpointError, match=f"model.safetensors.*{HUGE - 8:,}"):
        READERS[name](reader)


def test_nor_where_a_file_is_only_to_be_known_again(tmp_path, little_memory):
    as_long_as_its_header(tmp_path / "model.safetensors")
    assert weight_files.fingerprint(tmp_path / "model.safetensors")["size"] == HUGE


@pytest.mark.parametrize("large", [False, True])
def test_the_list_of_what_an_archive_holds_is_as_long_as_its_end_says(tmp_path, little_memory, large):
    """In the record of archives of any size, or in that of large ones, to which a locator points."""
    file, listing = tmp_path / "pytorch_model.bin", HUGE - 200
    torch.save({"a": torch.ones(3, 4)}, file)
    assert forms(file) == {"a": (torch.float32, (3, 4))}
    end = b"PK\5\6" + bytes(8) + listing.to_bytes(4, "little") + bytes(6)
    if large:
        record = b"PK\6\6" + (44).to_bytes(8, "little") + bytes(28) + listing.to_bytes(8, "little") + bytes(8)
        locator = b"PK\6\7" + bytes(4) + HUGE.to_bytes(8, "little") + (1).to_bytes(4, "little")
        end = record + locator + b"PK\5\6" + bytes(8) + b"\xff" * 8 + bytes(2)
    with file.open("r+b") as opened:
        opened.seek(HUGE)
        opened.write(end)
    with pytest.raises(CheckpointError, match=f"pytorch_model.bin.*{listing:,}"):
        forms(file)


def test_a_file_in_an_archive_that_is_to_be_longer_than_the_archive(tmp_path):
    """By the list at its end, which PyTorch believes."""
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(333)}, file)
    content = file.read_bytes()
    at = content.rindex((1332).to_bytes(4, "little") * 2)  # packed and unpacked
    file.write_bytes(content[:at] + (HUGE).to_bytes(4, "little") * 2 + content[at + 8 :])
    with pytest.raises(CheckpointError, match=f"pytorch_model.bin.*{HUGE:,}"):
        forms(file)


def test_a_shape_that_is_more_than_the_file_holds(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(1).expand(10**6, 10**6)}, file)
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin.*a of shape \(1000000, 1000000\)"):
        forms(file)


def test_a_number_in_several_places_is_read_as_long_as_it_fits(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(1).expand(4, 4), "b": torch.ones(8)}, file)
    assert forms(file)["a"] == (torch.float32, (4, 4))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "adapter_config.json"])
def test_json_that_is_far_too_long_is_not_read(bench, tmp_path, little_memory, name):
    adapter = name.startswith("adapter")
    folder = shutil.copytree(bench / ("adapter" if adapter else "one"), tmp_path / "one")
    if "index" in name:
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        (folder / name).write_text(json.dumps({"weight_map": {}}))
    os.truncate(folder / name, HUGE)
    with pytest.raises(ConfigError, match=f"{name}.*{HUGE:,}"):
        read_settings(folder) if adapter else open_checkpoint(folder, "one")


def test_a_limit_is_above_what_models_have(bench, tmp_path):
    """A configuration with thousands of labels, say, is read."""
    folder = shutil.copytree(bench / "one", tmp_path / "one")
    settings = json.loads((folder / "config.json").read_text())
    settings["unused"] = "x" * (LARGEST_SETTINGS // 2)
    (folder / "config.json").write_text(json.dumps(settings))
    assert open_checkpoint(folder, "one").config.hidden_size == 16


def test_nothing_that_long_is_fetched_from_the_hub():
    sizes = {"config.json": 700, "tokenizer.json": HUGE, "model.safetensors.index.json": HUGE, "vocab.json": 9}
    assert small_files(sizes) == ["config.json", "vocab.json"]


def test_a_tokenizer_that_is_far_too_long_is_named(bench, tmp_path, little_memory):
    folder = shutil.copytree(bench / "one", tmp_path / "one")
    os.truncate(folder / "tokenizer.json", HUGE)
    with pytest.raises(ConfigError, match=f"tokenizer.json.*{HUGE:,}"):
        load_tokenizer(folder)
