"""Whatever is read as a text must be a file: of a pipe, a socket or a device nobody waits for what never comes."""

import os
import shutil
import signal
import socket

import pytest
import tiny
import yaml

import merge_monster
import monster_mapper
from modules.config.inputs import read_neutral_texts, read_prompts
from modules.config.load import load_config
from modules.output.journal import open_journal, read_journal
from modules.output.recipe import read_outputs, read_recipe
from modules.runtime.errors import ConfigError
from modules.runtime.input_files import open_input

PATIENCE = 20  # seconds


@pytest.fixture(autouse=True)
def impatient():
    """A test that waits for ever fails."""

    def tell(_number, _frame):
        raise TimeoutError("it waits for what never comes")

    before = signal.signal(signal.SIGALRM, tell)
    signal.alarm(PATIENCE)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(path.name)  # its whole path may be too long


def make_link_to_a_pipe(path):
    os.mkfifo(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def make_device(path):
    path.symlink_to("/dev/zero")


KINDS = {"pipe": make_pipe, "socket": make_socket, "link": make_link_to_a_pipe, "device": make_device}
WORDS = {"pipe": "this is a pipe", "socket": "this is a socket", "link": "this is a pipe", "device": "this is a device"}


def with_phrases(path, **settings):
    phrases = [{"phrase": "spine", "contexts": ["down her "]}]
    directories = {"model_path1": str(path.parent), "output_directory": "out"}
    document = {"directories": directories, "models_to_merge": [str(path.parent)], "bad_phrases": phrases, **settings}
    my = path.with_name("my.yaml")
    my.write_text(yaml.safe_dump(document))
    return load_config(my)


READERS = {
    "a configuration": load_config,
    "phrase_files": lambda path: with_phrases(path, phrase_files=[str(path)]),
    "held_out_files": lambda path: with_phrases(path, held_out_files=[str(path)]),
    "neutral_texts": lambda path: read_neutral_texts([str(path)]),
    "discover.prompts": lambda path: read_prompts([str(path)], True, "discover.prompts"),
    "a recipe": read_recipe,
    "an output's recipe": lambda path: read_outputs([path]),
    "a journal": open_journal,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_refused_by_name(place, kind, reader):
    KINDS[kind](place / "it")
    with pytest.raises(ConfigError) as caught:
        READERS[reader](place / "it")
    assert "it: " in str(caught.value) and WORDS[kind] in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_names_the_path_and_a_file_is_read(place, kind):
    KINDS[kind](place / "it")
    with pytest.raises(OSError) as caught:
        open_input(place / "it")
    assert caught.value.filename == str(place / "it") and caught.value.strerror.startswith(WORDS[kind])
    assert read_journal(place / "it") == []
    (place / "file").write_text("a\r\nb")
    (place / "link").symlink_to("file")
    with open_input(place / "link") as as_bytes, open_input(place / "link", "utf-8") as as_text:
        assert (as_bytes.read(), as_text.read()) == (b"a\r\nb", "a\nb")
    with pytest.raises(FileNotFoundError):
        open_input(place / "absent")


OPTIONAL = (
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
)


@pytest.mark.parametrize(
    "files, code", [(["config.json"], 2), (["tokenizer.json"], 2), ([*OPTIONAL, "README.md", "LICENSE"], 0)], ids=str
)
def test_pipes_in_model_folders_are_as_if_they_were_not_there(place, models, capsys, files, code):
    for name, folder in zip(("base", "one"), models, strict=False):
        shutil.copytree(folder, place / name, ignore=shutil.ignore_patterns(*files))
        for file in files:
            os.mkfifo(place / name / file)
    settings = {"samples": [], "neutral_texts": [], "baselines": False, "merge_ratios": [0.5]}
    path = tiny.write_config(place / "my.yaml", "base", ["one"], "out", **settings)
    assert merge_monster.main(["--config", str(path), "--quiet"]) == code
    assert "internal error" not in capsys.readouterr().err


def test_the_programs_refuse_a_pipe(place, capsys):
    os.mkfifo("pipe")
    assert merge_monster.main(["--config", "pipe"]) == 2
    assert merge_monster.main(["--replay", "pipe", "--output", "out"]) == 2
    assert merge_monster.main(["--compare", "pipe"]) == 2
    assert merge_monster.main(["--export-mergekit", "file", "pipe"]) == 2
    assert monster_mapper.main(["--config", "pipe"]) == 2
    assert capsys.readouterr().err.count("this is a pipe") == 5
