"""New weight files: byte for byte those of safetensors, whatever comes in whatever order, and read back."""

import errno
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import modules.checkpoints.writing
from modules.checkpoints.readers import DTYPES, TensorInfo
from modules.checkpoints.writing import NewWeights
from modules.runtime.errors import CheckpointError

ONE = "model.safetensors"


def some_tensors():
    """Every dtype, shapes with nothing in them, names with signs that JSON escapes."""
    torch.manual_seed(0)
    tensors = {f"{name.lower()}.weight": (torch.randn(5, 3) * 50).to(dtype) for name, dtype in DTYPES.items()}
    return tensors | {
        "a.scalar": torch.tensor(2.5),
        "a.nothing": torch.empty(0, 4),
        'a "quoted" \\ näme\u2028\n': torch.ones(7),
        "transposed": torch.randn(4, 6).T,
        "a.large": torch.randn(700, 999),
    }


def infos(tensors, file=ONE):
    return {name: TensorInfo(file, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def test_a_file_is_that_of_safetensors(tmp_path):
    tensors = some_tensors()
    weights = NewWeights(tmp_path, infos(tensors))
    for name in reversed(tensors):
        weights.write(name, tensors[name])
    weights.finish()
    expected = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(expected, tmp_path / "expected", metadata={"format": "pt"})
    assert (tmp_path / ONE).read_bytes() == (tmp_path / "expected").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".json"] == []


def test_rows_come_in_any_order_and_shards_get_an_index(tmp_path):
    tensors = {"wide": torch.randn(10, 4), "thin": torch.randn(3).bfloat16()}
    known = infos(tensors)
    known["thin"] = replace(known["thin"], file="model-2.safetensors")
    weights = NewWeights(tmp_path, known)
    weights.write("thin", tensors["thin"])
    for first, end in ((7, 10), (0, 3), (3, 7)):
        weights.write("wide", tensors["wide"][first:end], first)
    weights.finish()
    assert torch.equal(load_file(tmp_path / ONE)["wide"], tensors["wide"])
    assert torch.equal(load_file(tmp_path / "model-2.safetensors")["thin"], tensors["thin"])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 166},
        "weight_map": {"thin": "model-2.safetensors", "wide": ONE},
    }


def test_what_has_not_come_is_missed(tmp_path):
    tensors = {"wide": torch.randn(10, 4)}
    weights = NewWeights(tmp_path, infos(tensors))
    weights.write("wide", tensors["wide"][:9])
    with pytest.raises(AssertionError, match="not all that was announced"):
        weights.finish()
    with pytest.raises(AssertionError, match="wide is not what was announced"):
        weights.write("wide", tensors["wide"].half())


@pytest.mark.parametrize("size", [3, 8, 1_500_001])
def test_a_byte_that_the_disk_spoils_is_noticed(tmp_path, monkeypatch, size):
    """The last one: of a few, of eight, of more than are compared at once."""
    own = modules.checkpoints.writing._reads

    def spoiled(file, expected):
        at_end = file.seek(0, 1) + len(expected) == (tmp_path / ONE).stat().st_size
        if at_end:
            with (tmp_path / ONE).open("r+b") as other:
                other.seek(-1, 2)
                other.write(b"\x55")
        return own(file, expected)

    tensors = {"bytes": torch.zeros(size, dtype=torch.uint8)}
    weights = NewWeights(tmp_path, infos(tensors))
    weights.write("bytes", tensors["bytes"])
    monkeypatch.setattr(modules.checkpoints.writing, "_reads", spoiled)
    with pytest.raises(CheckpointError, match="bytes reads back differently"):
        weights.write("bytes", tensors["bytes"])


def test_a_full_disk_is_told_with_the_file(tmp_path, monkeypatch):
    weights = NewWeights(tmp_path, infos({"one": torch.ones(3)}))

    def full(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(modules.checkpoints.writing, "_reads", full)
    with pytest.raises(CheckpointError, match=r"model.safetensors: can't be written \(.*No space left on device"):
        weights.write("one", torch.ones(3))
    with pytest.raises(CheckpointError, match=r"nowhere.*can't be written"):
        NewWeights(tmp_path / "nowhere", infos({"one": torch.ones(3)}))
