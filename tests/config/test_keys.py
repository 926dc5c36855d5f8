"""What is written of the keys: all of it comes from the schema, and files that are shipped name it."""

import json
import re
import sys

import pytest
import yaml
from project import ROOT

sys.path.insert(0, str(ROOT / "demo"))

from write_keys import SCHEMA, comment, json_schema, keys, written


def test_what_is_written_of_the_keys_is_what_the_schema_says():
    """If not, python demo/write_keys.py writes it anew."""
    for file, text in written().items():
        assert (ROOT / file).read_text(encoding="utf-8") == text, file


def test_every_key_is_described_in_at_most_two_lines_of_yaml():
    for key, said in keys(json_schema()).items():
        assert key == "contexts" or 1 <= len(comment(key, said, "# ")) <= 2, key


def test_no_section_takes_an_unknown_key():
    schema = json_schema()
    assert all(section["additionalProperties"] is False for section in (schema, *schema["$defs"].values()))


@pytest.mark.parametrize(
    "file", [*ROOT.glob("default*.yaml"), *(ROOT / "example_phrases").glob("*.yaml")], ids=lambda file: file.name
)
def test_a_file_that_is_shipped_names_its_schema(file):
    text = file.read_text(encoding="utf-8")
    path, _, fragment = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)[1].partition("#")
    schema = json.loads((ROOT / SCHEMA).read_text(encoding="utf-8"))
    assert (file.parent / path).resolve() == ROOT / SCHEMA
    for name in fragment.split("/")[1:]:
        schema = schema[name]
    document = yaml.safe_load(text)
    assert set(schema.get("required", [])) <= set(document) <= set(schema["properties"])
