"""Local sources by their names: where a recipe's are found, and what a text says of their folders."""

import os

import pytest

from modules.output.changes import named
from modules.output.recipe import find_source, folders_near, folders_of

ID = "org/m@" + "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def folders(place):
    """Two folders, of which both have `one`, the first `two`, and the second a name with a plus."""
    for name in ("mine/one", "mine/two", "other/one", "other/with+plus"):
        (place / name).mkdir(parents=True)
    return [place / "mine", place / "other"]


@pytest.mark.parametrize(
    "where, found",
    [
        ("one", "mine/one"),
        ("with+plus", "other/with+plus"),
        ("one+two", "mine/one+mine/two"),
        (ID, ID),
        (f"{ID}+{ID}", f"{ID}+{ID}"),
        (f"{ID}+two", f"{ID}+mine/two"),
        (f"two+{ID}", f"mine/two+{ID}"),
        ("three", None),
        (f"{ID}+three", None),
        ("", None),
        ("a\0b", None),
        ("x" * 5000, None),
    ],
)
def test_a_source_is_found_by_its_name(place, folders, where, found):
    expected = found and "+".join(part if "@" in part else str(place / part) for part in found.split("+"))
    if found == "other/with+plus":
        expected = str(place / found)
    assert find_source(where, folders) == expected


def test_where_they_are_looked_for(place, folders):
    (place / "mine/two/recipe.json").touch()
    expected = [folders[1], place / "mine/two", place / "mine", place]
    assert folders_of(place / "mine/two/recipe.json", folders[1:]) == expected
    assert folders_of(place / "mine/two", folders[1:]) == expected


def test_folders_in_a_text_go_by_their_names(place):
    given = [(f"{place}/models/one", "one"), (f"{place}/models/one-more", "more"), ("models/two", "two"), ("x", "y")]
    text = f"{place}/models/one/a.bin, {place}/models/one-more: x; models/two/b"
    assert named(text, given) == "one/a.bin, more: x; two/b"
    assert named(f"{place}/x {os.path.expanduser('~')}/y / and/or", []) == "./x ~/y / and/or"


def test_folders_in_and_beside_are_looked_in_too(place):
    (place / "models/base").mkdir(parents=True)
    (place / "here/out").mkdir(parents=True)
    folders = [place / "here/out", place / "here"]
    assert find_source("base", folders) is None
    assert find_source("base", [*folders, *folders_near(folders)]) == str(place / "models/base")
    assert folders_near([place / "not there"]) == [place / "here", place / "models"]
