"""Write the descriptions of the YAML file's keys, which stand in modules/config/schema.py, wherever they are read.

    python demo/write_keys.py

Knows: how a key is shown in modules/config/schema.json, in the table of docs/use.md, and above its line in default.yaml
and default-mapper.yaml. Refuses to know: any key.
"""

import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from pydantic import TypeAdapter  # noqa: E402

from modules.config.choices import STRATEGIES  # noqa: E402
from modules.config.phrase_lists import PhraseLists, Section  # noqa: E402
from modules.config.schema import Settings  # noqa: E402
from modules.merging.methods import METHODS  # noqa: E402

SCHEMA, TABLE = "modules/config/schema.json", "docs/use.md"
YAML_FILES = ("default.yaml", "default-mapper.yaml")
# What each value of a key does.
CHOICES = {"merge_method": {name: method.summary for name, method in METHODS.items()}, "strategy": STRATEGIES}
HEAD = "| key | default | meaning |\n|---|---|---|\n"
MAPPERS = ("mapper.", "discover.")  # keys that default-mapper.yaml alone explains
WIDTH = 120
MOST_LINES = 2  # of a comment


def json_schema() -> dict[str, Any]:
    """What an editor needs to complete and check a configuration and, under $defs/PhraseLists, a phrase list."""
    Section.__pydantic_config__["use_attribute_docstrings"] = True  # only here: a typo should not wait for it
    schema, lists = (TypeAdapter(kind).json_schema() for kind in (Settings, PhraseLists))
    schema["$defs"] |= lists.pop("$defs") | {"PhraseLists": lists}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def keys(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the schema says of every key, those of a section with a dot, those of a phrase's entry behind the lists."""
    found = {}
    for key, said in schema["properties"].items():
        if "$ref" in said:
            section = section_of(said, schema)
            for inner, more in section["properties"].items():
                found[f"{key}.{inner}"] = {"required": inner in section.get("required", []), **more}
        else:
            found[key] = said
        if key == "good_phrases":
            entry = schema["$defs"]["Phrase"]
            for inner, more in entry["properties"].items():
                found[inner] = {"required": inner in entry["required"], **more}
    return found


def section_of(said: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Of a key that is a mapping, what the schema says of that; a description of its own comes before."""
    return {**schema["$defs"][said["$ref"].rpartition("/")[2]], **said}


def names_of(key: str, said: dict[str, Any]) -> list[str]:
    """The values of a key whose values have names. quantitative is the other spelling of quantitive."""
    if "format" in said and key == "device":
        return re.split(", | or ", said["format"])
    names = said.get("enum", list(CHOICES.get(key, {})))
    return [name for name in names if name != "quantitative"]


def text_of(key: str, said: dict[str, Any]) -> str:
    """A key's description on one line, then its named values, unless the description has them all."""
    text = " ".join(said["description"].split())
    names = names_of(key, said)
    if all(re.search(rf"\b{re.escape(name)}(?![+\w])", text) for name in names):
        return text
    return f"{text} Values: {', '.join(names[:-1])} or {names[-1]}."


def row(key: str, said: dict[str, Any]) -> str:
    """A key's line of the table; the pages that it names become links."""
    value = said.get("default")
    default = f"`{value if isinstance(value, str) else json.dumps(value)}`"
    if said.get("required") or value == "":  # an output is required by most uses
        default = "required"
    meaning = re.sub(r"docs/([\w-]+)\.md(#[\w-]+)?", link, text_of(key, said))
    return f"| `{key}` | {default} | {meaning} |\n"


def link(match: re.Match[str]) -> str:
    """A link to a page, or to a part of the page that has the table."""
    page, part = match[1], match[2] or ""
    return f"[{page}]({part})" if f"docs/{page}.md" == TABLE else f"[{page}]({page}.md{part})"


def described(key: str, said: dict[str, Any]) -> str:
    """A key's description, with what each of its values does or, where that needs no saying, their names."""
    choices = [f"{name}: {what}." for name, what in CHOICES.get(key, {}).items()]
    return " ".join([*said["description"].split(), *choices]) if choices else text_of(key, said)


def with_table(page: str, schema: dict[str, Any]) -> str:
    """The page with its table of keys anew."""
    before, rest = page.split(HEAD)
    rows = [row(key, said) for key, said in keys(schema).items() if not key.startswith(MAPPERS)]
    return before + HEAD + "".join(rows) + rest[rest.index("\n\n") + 1 :]


def with_comments(text: str, schema: dict[str, Any]) -> str:
    """A YAML file with the comment above each key anew."""
    sections = {key: section_of(said, schema) for key, said in schema["properties"].items() if "$ref" in said}
    described = {**sections, **keys(schema)}
    lines: list[str] = []
    section = ""
    for line in text.splitlines():
        match = re.match(r"(  )?(\w+):( |$)", line)
        if match:
            section = section if match[1] else match[2]
            key = f"{section}.{match[2]}" if match[1] else match[2]
            if key in described:
                while lines and lines[-1].lstrip().startswith("#"):
                    lines.pop()
                indent = "  " if match[1] else ""
                lines += comment(key, described[key], f"{indent}# ")
        lines.append(line)
    return "\n".join(lines) + "\n"


def comment(key: str, said: dict[str, Any], indent: str) -> list[str]:
    """A key's description with its values: what each does or, if that is too long, their names."""
    lines = wrapped(described(key, said), indent)
    return lines if len(lines) <= MOST_LINES else wrapped(text_of(key, said), indent)


def wrapped(text: str, indent: str) -> list[str]:
    """The lines of a comment."""
    text = " ".join(text.split())
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def written() -> dict[str, str]:
    """Each file's text as it should be."""
    schema = json_schema()
    texts = {file: (ROOT / file).read_text(encoding="utf-8") for file in (TABLE, *YAML_FILES)}
    shown = re.findall(r"^(\w+):", "\n".join(texts[file] for file in YAML_FILES), re.MULTILINE)
    for key, said in schema["properties"].items():
        if key not in shown:
            value = said.get("default")
            texts[YAML_FILES[0]] += f"\n{key}:{'' if value is None else ' ' + json.dumps(value)}\n"
    return {
        SCHEMA: json.dumps(schema, indent=2) + "\n",
        TABLE: with_table(texts[TABLE], schema),
        **{file: with_comments(texts[file], schema) for file in YAML_FILES},
    }


if __name__ == "__main__":
    for name, content in written().items():
        (ROOT / name).write_text(content, encoding="utf-8")
