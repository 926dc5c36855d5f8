"""Texts on the disk: what is found again, what another way of drawing does not find, what a broken end leaves."""

import pytest

from modules.discovery.kept_texts import KeptTexts
from modules.runtime import ConfigError

WAY = {"seed": 1, "model": {"config.json": {"size": 3}}}
TEXTS = ("one\ntwo", 'three " \u2028 four', "")


def test_what_was_kept_is_found_again(tmp_path):
    kept = KeptTexts(tmp_path / "samples", "org/a model", WAY)
    assert kept.get("A?") is None
    kept.add({"A?": TEXTS})
    kept.add({"B?": ["other"], "D?": []})
    again = KeptTexts(tmp_path / "samples", "org/a model", dict(reversed(WAY.items())))
    assert again.path == kept.path and again.path.name.startswith("org-a-model-")
    assert again.get("A?") == TEXTS and again.get("B?") == ("other",) and again.get("C?") is None


def test_another_way_has_a_file_of_its_own(tmp_path):
    KeptTexts(tmp_path, "model", WAY).add({"A?": TEXTS})
    assert KeptTexts(tmp_path, "model", {**WAY, "seed": 2}).get("A?") is None
    assert KeptTexts(tmp_path, "model", WAY).get("A?") == TEXTS


@pytest.mark.parametrize("left", range(1, 30, 4))
def test_a_line_that_was_being_written_is_written_anew(tmp_path, left):
    kept = KeptTexts(tmp_path, "model", WAY)
    kept.add({"A?": TEXTS})
    whole = kept.path.read_bytes()
    kept.add({"B?": TEXTS, "C?": TEXTS})
    both = kept.path.read_bytes()
    kept.path.write_bytes(both[: len(whole) + left])
    again = KeptTexts(tmp_path, "model", WAY)
    assert again.get("A?") == TEXTS and again.get("B?") is again.get("C?") is None
    again.add({"B?": TEXTS, "C?": TEXTS})
    assert again.path.read_bytes() == both


@pytest.mark.parametrize("line", ["no json\n", "[]\n", '{"A?": 3}\n', '{"A?": ["\n'])
def test_a_damaged_line(tmp_path, line):
    kept = KeptTexts(tmp_path, "model", WAY)
    kept.add({"A?": TEXTS})
    with kept.path.open("a") as file:
        file.write(line)
    with pytest.raises(ConfigError, match="is damaged; delete it"):
        KeptTexts(tmp_path, "model", WAY)


def test_a_folder_that_can_not_be(tmp_path):
    (tmp_path / "samples").write_text("a file")
    with pytest.raises(ConfigError, match="can't be used"):
        KeptTexts(tmp_path / "samples", "model", WAY)
