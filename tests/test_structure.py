"""The house rules that a machine can check: imports run one way, and only some files hear of torch."""

import ast
import re

from project import ROOT

PACKAGES = (
    "runtime",
    "merging",
    "config",
    "checkpoints",
    "model",
    "scoring",
    "search",
    "metrics",
    "output",
    "learn",
    "mapper",
    "slop",
    "run",
)
SOURCES = {
    path.relative_to(ROOT / "modules").with_suffix("").as_posix(): path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "modules").glob("*/*.py"))
}
WITHOUT_TORCH = ("runtime", "config")  # what a typo waits for
HEARS_OF_TORCH_MODULES = (
    "checkpoints/architecture",
    "checkpoints/conversion",
    "checkpoints/candidate",
    "learn/adapter",
    "model",
    "scoring",
)


def imports(source):
    """Every module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_a_package_imports_only_from_those_before_it():
    assert {name.split("/")[0] for name in SOURCES} == set(PACKAGES)
    for name, source in SOURCES.items():
        package = name.split("/")[0]
        for imported in imports(source):
            if imported.startswith("modules."):
                other = imported.split(".")[1]
                assert PACKAGES.index(other) <= PACKAGES.index(package), f"{name} imports {imported}"
                # Within a package a file imports from a file, not from the package: nothing runs in a circle.
                assert other != package or imported.count(".") == 2 or name.endswith("__init__"), f"{name}: {imported}"


def test_who_touches_what():
    """What a typo waits for stays light, and only model code touches torch modules."""
    for name, source in SOURCES.items():
        heavy = {imported.split(".")[0] for imported in imports(source)} & {"torch", "transformers", "safetensors"}
        assert not name.startswith(WITHOUT_TORCH) or name == "runtime/distributed" or not heavy, name
        assert name.startswith(HEARS_OF_TORCH_MODULES) or not re.search(r"\bnn\b|\.forward\b|state_dict", source), name


def test_a_line_assigns_one_value():
    for name, source in SOURCES.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
                several = isinstance(node.value, ast.Tuple) and len(node.value.elts) == len(node.targets[0].elts)
                assert not several or _swaps(node), f"{name}, line {node.lineno}"


def _swaps(node):
    """Whether a value is made of what another target held before."""
    targets = {ast.unparse(target) for target in node.targets[0].elts}
    return any(ast.unparse(part) in targets for part in ast.walk(node.value) if isinstance(part, ast.Name))


def test_no_comprehension_is_in_another():
    kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    for name, source in SOURCES.items():
        for node in ast.walk(ast.parse(source)):
            inner = [part for part in ast.walk(node) if part is not node and isinstance(part, kinds)]
            assert not (isinstance(node, kinds) and inner), f"{name}, line {node.lineno}"


def test_no_maker_of_devices_is_named():
    """What is written for one kind of device is never run on another."""
    named = {name for name, source in SOURCES.items() if re.search(r"(?i)\b(cuda|xpu|mps|rocm|nvidia)\b", source)}
    assert named == {"config/choices"}


def test_a_message_is_given_line_by_line():
    """A line end within a text is shown escaped: it may be a stranger's."""
    for node in (node for source in SOURCES.values() for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.Raise) or (
            isinstance(node, ast.Call) and ast.unparse(node.func).startswith("console.")
        ):
            texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            assert not any("\n" in str(text) for text in texts), ast.unparse(node)


def test_every_file_opens_with_what_it_knows_and_refuses_to_know():
    for name, source in SOURCES.items():
        opening = ast.get_docstring(ast.parse(source))
        assert "Knows:" in opening and "Refuses to know:" in opening, name


def test_the_page_on_internals_lists_the_packages_in_their_order():
    page = (ROOT / "docs/internals.md").read_text(encoding="utf-8")
    assert tuple(re.findall(r"^\| `modules/(\w+)/` \|", page, re.MULTILINE)) == PACKAGES


def test_requirements_hold_nothing_but_what_the_run_needs():
    names = [re.split(r"[<>=]", line)[0] for line in (ROOT / "requirements.txt").read_text().split()]
    needed = (
        "accelerate gguf huggingface_hub matplotlib peft protobuf psutil pydantic pyyaml regex safetensors "
        "sentencepiece torch tqdm transformers wordfreq wordsegment"
    )
    assert sorted(names) == needed.split()
