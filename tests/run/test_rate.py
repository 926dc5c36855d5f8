"""The rate's models by name: of a folder as much as tells it apart, of the hub its id."""

from pathlib import Path

import pytest

from modules.config import Config, Directories
from modules.run.rate import names_for


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (["one/base", "one/merge"], ["base", "merge"]),
        (["one/base", "two/base", "one/base"], ["one/base", "two/base", "one/base"]),
        (["one/base", "./one/../one/base"], ["base", "base"]),
        (["/gone/base"], ["base"]),
        (["org/name@main", "one/base"], ["org/name@main", "base"]),
    ],
)
def test_names(tmp_path, monkeypatch, texts, names):
    monkeypatch.chdir(tmp_path)
    for folder in ("one/base", "one/merge", "two/base"):
        Path(folder).mkdir(parents=True)
    assert names_for([Config(Directories(text, "")) for text in texts]) == names
