"""Why a file or folder is not the model that it was named as: what is there instead.

Knows: how files begin, what other formats call theirs. Refuses to know: configurations, tensors, what a model needs.
"""

from collections.abc import Collection, Iterable
from fnmatch import fnmatch
from pathlib import Path

from modules.runtime import open_input

_POINTER = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")
_AGAIN = "fetch it again"

_OF_BIN_FILES = (b"PK\x03\x04", b"\x80\x02")  # how those begin that are what their name says
# How files begin that may lie under another one's name.
_BEGINNINGS = (
    (b"GGUF", "is a GGUF file, which llama.cpp reads; call it .gguf and name the file itself as the model"),
    (b"\x89HDF", "is a file of Keras or TensorFlow; the model is needed as safetensors"),
    (b"\x1f\x8b", "is packed (gzip); unpack it"),
    (b"PK\x03\x04", "is a zip archive; if PyTorch wrote it, call it pytorch_model.bin, else unpack it"),
    (b"\x80\x02", "is a pickle; if PyTorch wrote it, call it pytorch_model.bin"),
)

# Names of weights that no run reads, in this order, and what they are.
_OTHER_FORMATS = (
    ("*.gguf", "GGUF, which llama.cpp reads; name the file itself"),
    ("consolidated*", "the format in which Meta and Mistral publish, to be converted"),
    ("tf_model*", "TensorFlow"),
    ("flax_model*", "Flax"),
    ("*.h5", "Keras"),
    ("*.msgpack", "Flax"),
    ("*.onnx*", "ONNX"),
    ("openvino_model*", "OpenVINO"),
    ("*.distcp", "shards of a training run, to be gathered"),
    ("*.npz", "MLX or NumPy"),
    ("adapter_model*", "an adapter, whose adapter_config.json is missing"),
    ("*-of-*.safetensors", "a shard, whose model.safetensors.index.json is missing"),
    ("*-of-*.bin", "a shard, whose pytorch_model.bin.index.json is missing"),
    ("*.safetensors", "under another name than model.safetensors"),
    ("*.ckpt", "a checkpoint of a training program, to be converted"),
    ("*.pt", "a file of PyTorch under another name than pytorch_model.bin"),
    ("*.pth", "a file of PyTorch under another name than pytorch_model.bin"),
    ("*.bin", "under another name than pytorch_model.bin"),
)
_NO_WEIGHTS = ("training_args*", "optimizer*", "scheduler*", "rng_state*", "scaler*")


def disguise(path: Path) -> str | None:
    """What a file is, judging by its beginning, if that is something else than what its name says; with advice."""
    start = _beginning(path)
    if start is None:
        return None
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start:
        return f"is empty; {_AGAIN}"
    if start.startswith(_POINTER):
        return "is a git-LFS pointer, not the file itself; run 'git lfs pull' in its folder"
    if text.lower().startswith(_PAGES):
        return f"is a web page (HTML or XML), as a download that failed leaves it; {_AGAIN}"
    if not any(start):
        return f"begins with nothing but zeros, as a broken download or a full disk leaves it; {_AGAIN}"
    return _other_weights(path.suffix, start, text)


def _beginning(path: Path) -> bytes | None:
    try:
        with open_input(path) as file:
            return file.read(512)
    except OSError:
        return None  # for its reader to complain about


def _other_weights(suffix: str, start: bytes, text: bytes) -> str | None:
    """What is under a name of weights: those of another format, or text, which weights are not."""
    is_safetensors = start[4:9] == b"\0\0\0\0{"  # a header's length, then the header
    if suffix == ".bin" and is_safetensors:
        return "is a safetensors file; call it model.safetensors"
    if suffix not in (".bin", ".safetensors") or is_safetensors:
        return None
    for beginning, what in _BEGINNINGS:
        if start.startswith(beginning) and not (suffix == ".bin" and beginning in _OF_BIN_FILES):
            return what
    words = text.decode("latin-1")
    if not all(character.isascii() and (character.isprintable() or character.isspace()) for character in words):
        return None
    kind = "JSON" if words.startswith(("{", "[")) else "text"
    return f"is {kind}, not weights: '{' '.join(words[:60].split())}'; {_AGAIN}"


def pointers(folder: Path, names: Iterable[str]) -> str | None:
    """A line if files of these names are git-LFS pointers; those that are not there are none."""
    found = [name for name in names if (_beginning(folder / name) or b"").startswith(_POINTER)]
    if not found:
        return None
    more = f" and {len(found) - 1} more files" if len(found) > 1 else ""
    what = "are git-LFS pointers, not the files themselves" if more else "is a git-LFS pointer, not the file itself"
    return f"{folder / found[0]}{more}: {what}; run 'git lfs pull' in {folder}"


def found_instead(folder: Path, names: Collection[str], missing: Collection[str]) -> str:
    """What a folder holds in place of a model, to be put behind a message; empty if that is nothing known.

    names: of all its files. missing: names of files any of which would have been right.
    """
    for pattern, what in _OTHER_FORMATS:
        found = sorted(n for n in names if fnmatch(n, pattern) and not any(fnmatch(n, no) for no in _NO_WEIGHTS))
        if found:
            return f"; found {found[0]} ({what})"
    deeper = sorted(
        {path.parent for name in missing for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{name}")}
    )
    if deeper:
        return f"; there is one in a folder below: name {' or '.join(map(str, deeper[:3]))}"
    return ""
