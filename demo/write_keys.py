"""Write the descriptions of the YAML file's keys, which stand in modules/config/schema.py, wherever they are read.

    python demo/write_keys.py

Knows: how a key is shown in modules/config/schema.json, in the table of docs/configuration.md, and above its line in
default.yaml and default-mapper.yaml. Refuses to know: any key.
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

SCHEMA, TABLE = "modules/config/schema.json", "docs/configuration.md"
YAML_FILES = ("default.yaml", "default-mapper.yaml")
# What each value of a key does.
CHOICES = {"merge_method": {name: method.summary for name, method in METHODS.items()}, "strategy": STRATEGIES}
HEAD = "| key | type | default | meaning |\n|---|---|---|---|\n"
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


def kind(said: dict[str, Any]) -> str:
    """What a value can be, in words."""
    if "format" in said:
        return said["format"]
    if "anyOf" in said:
        return ", or a ".join(kind(one) for one in said["anyOf"] if one.get("type") != "null")
    if "enum" in said:
        names = [name for name in said["enum"] if name != "quantitative"]
        return f"{', '.join(names[:-1])} or {names[-1]}"
    if "const" in said:
        return said["const"]
    if said.get("type") == "array":
        items = said["items"]
        if "enum" in items:
            return "list of them"
        return (
            f"list of {items.get('format') or {'number': 'number', 'string': 'text'}.get(items.get('type'), 'entrie')}s"
        )
    if said.get("type") == "boolean":
        return "true or false"
    if said.get("type") in ("number", "integer"):
        return f"{'whole ' * (said['type'] == 'integer')}number{limits(said)}"
    return {"string": "text"}.get(said.get("type"), "mapping")


def limits(said: dict[str, Any]) -> str:
    """Between what a number must be. The largest numbers are no limits that anybody need know of."""
    low = f" above {said['exclusiveMinimum']}" if "exclusiveMinimum" in said else f" from {said['minimum']}"
    if "exclusiveMaximum" in said and said["exclusiveMaximum"] < 1e10:
        return f"{low} and below {said['exclusiveMaximum']}"
    if "maximum" in said and said["maximum"] < 1e10:
        return f"{low} up to {said['maximum']}"
    return low


def row(key: str, said: dict[str, Any]) -> str:
    """A key's line of the table; the pages that it names become links."""
    value = said.get("default")
    default = f"`{value if isinstance(value, str) else json.dumps(value)}`"
    if said.get("required") or value == "":  # an output is required by most uses
        default = "required"
    meaning = re.sub(r"docs/([\w-]+)\.md(#[\w-]+)?", r"[\1](\1.md\2)", described(key, said))
    return f"| `{key}` | {kind(said)} | {default} | {meaning} |\n"


def described(key: str, said: dict[str, Any]) -> str:
    """A key's description, with what each of its values does."""
    choices = ". ".join(f"{name}: {what}" for name, what in CHOICES.get(key, {}).items())
    return " ".join([*said["description"].split(), f"{choices}."] if choices else said["description"].split())


def with_table(page: str, schema: dict[str, Any]) -> str:
    """The page with its table of keys anew."""
    before, rest = page.split(HEAD)
    rows = [row(key, said) for key, said in keys(schema).items()]
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
    """A key's description with its values, if they are names: what each does or, if that is too long, the names."""
    lines = wrapped(described(key, said), indent)
    names = CHOICES.get(key) or said.get("enum", [key] if key == "device" else [])
    has_all = all(re.search(rf"\b{re.escape(name)}(?![+\w])", " ".join(lines)) for name in names)
    if not names or (has_all and len(lines) <= MOST_LINES):
        return lines
    values = ", ".join(CHOICES[key]) if key in CHOICES else kind(said)
    return wrapped(f"{said['description']} Values: {values}.", indent)


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
