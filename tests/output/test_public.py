"""Paths as anybody may read them: which are found in a text, what they are said as, where they lead back to."""

import os

import pytest

from modules.config import parts_of
from modules.output.public import Public, found_again, relative

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def public(place, monkeypatch):
    """Of a run that was started in work/, beside which there are models, and a home elsewhere."""
    for folder in ("work/out", "models/one", "models/one-more", "home/jane/deep"):
        (place / folder).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(place / "home/jane"))
    monkeypatch.chdir(place / "work")
    return Public("out", [place / "models/one", place / "models/one-more"])


@pytest.mark.parametrize(
    "text, said",
    [
        ("{}/models/one", "../models/one"),
        ("{}/models/one/model.safetensors: gone", "../models/one/model.safetensors: gone"),
        ("{}/models/one-more, {}/models/one.", "../models/one-more, ../models/one."),
        ("{}//models/./one/", "../models/one/"),
        ("'{}/models/one'+{}/models/one-more", "'../models/one'+../models/one-more"),
        ("x: {}/work/list.yaml", "x: list.yaml"),
        ("in {}/work", "in ."),
        ("{}/work/out.partial/a", "out.partial/a"),
        ("{}/home/jane/deep", "~/deep"),
        ("{}/home/jane", "~"),
        ("{}/home/janet/deep", None),
        ("{}/workshop", None),
        ("{}/work.old/a", None),
        ("other{}/work/a", None),
        ("models/one", None),
        ("and/or ~/x ../y http://a/b", None),
    ],
)
def test_paths_in_a_text(public, place, text, said):
    text = text.replace("{}", str(place))
    assert public.text(text) == (text if said is None else said)
    assert (public.found_in(text) is None) == (said is None)


def test_what_people_have_written_is_left_as_it_is(public, place):
    path = f"{place}/work/x"
    value = {"bad_phrases": [{"context": path}], "samples": [path], "other": [{"a": path, "b": 1.5, "c": None}, path]}
    said = {**value, "other": [{"a": "x", "b": 1.5, "c": None}, "x"]}
    assert public.value(value) == said and public.value({"phrases": path}) == {"phrases": path}


def test_where_a_source_lies_is_said_from_the_output_on(public, place):
    wheres = {
        f"{place}/models/one": "../../models/one",
        f"{place}/models/one+{place}/home/jane/deep": "../../models/one+~/deep",
        f"org/m@{COMMIT}+{place}/models/one": f"org/m@{COMMIT}+../../models/one",
        f"org/m@{COMMIT}": f"org/m@{COMMIT}",
        "/home/somebody/else's": "else's",
        "../../models/one": "../../models/one",
    }
    for where, said in wheres.items():
        assert public.value({"where": where}) == {"where": said}
        if "somebody" not in where:
            place_again = "+".join(map(os.path.expanduser, parts_of(found_again(said, "out"))))
            assert place_again == where or where.startswith("..")


def test_a_folder_that_is_looked_through_comes_first(public, place):
    (place / "mine/one").mkdir(parents=True)
    where = f"../../models/one+org/one@{COMMIT}+../../models/one-more"
    found = found_again(where, "out", [place / "nowhere", place / "mine"])
    assert found == f"{place}/mine/one+org/one@{COMMIT}+{place}/models/one-more"


@pytest.mark.parametrize("path", ["/", "", "a\0b", "/a\0b/" + "x" * 5000, "//", "\udcff/x"])
def test_what_can_be_no_path_does_no_harm(public, path):
    public.know(path, "said")
    for text in (path, f"{path} more", "/"):
        public.text(text)
        public.where(text)
        found_again(text, path)
    assert public.text("and / or") == "and / or" and isinstance(relative(path, "."), str)
