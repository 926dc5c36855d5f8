"""Prompts of a file: what counts as one, what is said of a file that has none."""

import pytest

from modules.config.inputs import read_prompts
from modules.runtime.errors import ConfigError


def test_a_prompt_for_each_line_that_is_one(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeff# asked of all\n\nTell me a story.  \r\n  Describe a bridge.\nTell me a story.\n#none\n")
    assert read_prompts([str(file)], for_chats=True, key="discover.prompts") == (
        "Tell me a story.",
        "Describe a bridge.",
    )


def test_the_shipped_ones():
    questions, openings = read_prompts(None, True, "own_texts"), read_prompts(None, False, "own_texts")
    assert len(questions) >= 40 and len(openings) >= 40 and not set(questions) & set(openings)
    assert all(question[-1] in ".?" for question in questions)
    assert not any(opening[-1] in ".?!" for opening in openings)  # a model goes on with the sentence


@pytest.mark.parametrize(
    ("content", "said"), [(None, "No such file"), (b"\xff\xfe\xfa", "utf-8"), (b"\n# no\n", "no prompts")]
)
def test_a_file_without_prompts(tmp_path, content, said):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"discover.prompts: {file}.*{said}"):
        read_prompts([str(file)], for_chats=True, key="discover.prompts")
