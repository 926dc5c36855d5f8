"""The header of a GGUF file: against gguf's own reader; and what a stranger may announce in it."""

import resource
import struct
import time

import pytest
import tiny

import merge_monster
from modules.checkpoints.gguf_header import read_header
from modules.runtime.errors import ConfigError

U8, U32, STRING, ARRAY, DOUBLE = 0, 4, 8, 9, 12
SECONDS = 1


def text(value):
    return struct.pack("<Q", len(value)) + value


def key(name, kind, value):
    return text(name.encode()) + struct.pack("<I", kind) + value


def array(kind, count, values=b""):
    return struct.pack("<IQ", kind, count) + values


def head(tensors=0, keys=1, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + key("general.architecture", STRING, text(b"llama"))


def tensor(name=b"a", dimensions=(4,), kind=0, offset=0):
    shape = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


def padded(content, numbers=64):
    return content + bytes(-len(content) % 32 + numbers)


HUGE = {
    "tensors": head(2**60),
    "as many tensors as fit nowhere": head(2**18),
    "keys": head(0, 2**60),
    "as many keys as fit nowhere": head(0, 2**16),
    "a key's name": head(0, 2) + struct.pack("<Q", 2**62),
    "a text": head(0, 2) + key("x", STRING, struct.pack("<Q", 2**63)),
    "an array of bytes": head(0, 2) + key("x", ARRAY, array(U8, 2**40)),
    "an array of numbers": head(0, 2) + key("x", ARRAY, array(DOUBLE, 2**40)),
    "an array whose size overflows": head(0, 2) + key("x", ARRAY, array(DOUBLE, 2**63)),
    "an array of as many as are allowed": head(0, 2) + key("x", ARRAY, array(U8, 2**21)),
    "an array of texts": head(0, 2) + key("x", ARRAY, array(STRING, 2**40)),
    "a text in an array": head(0, 2) + key("x", ARRAY, array(STRING, 1, struct.pack("<Q", 2**40))),
    "arrays in an array": head(0, 2) + key("x", ARRAY, array(ARRAY, 2**40)),
    "an array of an unknown type": head(0, 2) + key("x", ARRAY, array(99, 1)),
    "a key of an unknown type": head(0, 2) + key("x", 99, b""),
    "a key twice": head(0, 3) + 2 * key("x", U32, bytes(4)),
    "a tensor's name": head(1) + struct.pack("<Q", 2**40),
    "dimensions": head(1) + text(b"a") + struct.pack("<I", 2**30),
    "a dimension": padded(head(1) + tensor(dimensions=(2**62,))),
    "dimensions together": padded(head(1) + tensor(dimensions=(2**31, 2**31, 2**31, 2**31))),
    "no numbers at all": padded(head(1) + tensor(dimensions=(0,))),
    "a part of a block": padded(head(1) + tensor(dimensions=(5,), kind=2)),
    "an unknown kind of numbers": padded(head(1) + tensor(kind=9999)),
    "an offset": padded(head(1) + tensor(offset=2**62)),
    "the same place for two tensors": padded(head(2) + tensor(b"a") + tensor(b"b")),
    "a tensor twice": padded(head(2) + tensor(b"a") + tensor(b"a", offset=32)),
    "an alignment": padded(head(1, 2) + key("general.alignment", U32, struct.pack("<I", 2**31)) + tensor()),
    "an alignment of 3": padded(head(1, 2) + key("general.alignment", U32, struct.pack("<I", 3)) + tensor()),
    "another version": head(version=7),
    "nothing behind the beginning": b"GGUF",
}


@pytest.mark.parametrize("name", HUGE)
def test_what_a_file_announces_is_not_believed(tmp_path, name):
    file, start = tmp_path / "a.gguf", time.monotonic()
    file.write_bytes(HUGE[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match=r"a\.gguf: can't be read as GGUF"):
        read_header(file)
    assert time.monotonic() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB


def test_a_program_ends_at_once(tmp_path, capsys):
    file = tmp_path / "a.gguf"
    file.write_bytes(HUGE["an array of bytes"])
    config = tiny.write_config(tmp_path / "my.yaml", file, [file], tmp_path / "out")
    assert merge_monster.main(["--config", str(config)]) == 2
    assert f"{file}: can't be read as GGUF" in capsys.readouterr().err
