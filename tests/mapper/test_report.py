"""Trees and phrases as text, JSON and YAML: to the character."""

import math
import re
from dataclasses import replace

import pytest
import yaml
from completions import TokenizerOnly, completed, scripted

from modules.config.phrase_lists import Pair
from modules.config.schema import Mapper
from modules.mapper import report as mapping_report
from modules.mapper.ranking import PhraseRank, Suggestion
from modules.runtime.console import _COLOUR, coloured


@pytest.fixture(scope="module")
def model():
    return TokenizerOnly()


def standing(phrase="spine", context="down her ", probability=0.5, rare=False, better=None, kind="BAD", weight=1.0):
    suggestion = better and Suggestion(better, math.log(0.75))
    return PhraseRank(Pair(kind, phrase, context, weight), math.log(probability), 2, 3, rare, suggestion)


def plain(lines):
    """Without the colours, which the console takes out for the log."""
    return [_COLOUR.sub("", line) for line in lines]


def lines_of(model, tree, standings=(), prob_min=10.0):
    return mapping_report.tree_lines("2/7", tree, standings, Mapper(prob_min), model.detokenizer)


def test_a_context_to_the_character(model):
    branch = [("spine", 0.7951), (".", 0.621), ("|", None), (" His", 0.9)]
    tree = scripted(model, "It sent\nshivers down her ", branch, [("arm", 0.1), (".", 0.5)])
    found = lines_of(model, tree, [standing(better="arm", rare=True)])
    assert plain(found)[:6] == [
        "-" * 80,
        "CONTEXT 2/7: It sent shivers down her",
        "",
        "  1. Sequence: spine. | His",
        f"     Trace:    79.51% {trace(model, 'spine')} > 62.10% [.]",
        "     Joint:    49.38%",
    ]
    assert plain(found)[-4:] == [
        "TOTAL BRANCHES: 2",
        "",
        'BAD  "spine"  50.0%  rank 2 of 3, under 10%  suggestion: "arm" (75.0%)',
        "",
    ]


def test_a_continuation_that_was_broken_off_ends_in_an_ellipsis(model):
    tree = scripted(model, "down her ", [("spine", 0.7), ("|", None), (" His", 0.9)])
    (branch,) = tree.branches
    added = len(branch.nodes) - branch.length
    for length, end in ((added, "His\u2026"), (added + 1, "His")):
        lines = mapping_report.tree_lines("1/1", tree, [], Mapper(10.0, 3, 5, length), model.detokenizer)
        assert lines[3] == f"  1. Sequence: spine | {end}"


def test_how_many_branches_were_cut_is_one_line(model):
    whole = scripted(model, "down her ", [("spine", 0.5)])
    (line,) = mapping_report.cut_lines([replace(whole, cut=cut) for cut in (4, 0, 2)])
    assert [int(number) for number in re.findall(r"\d+", line)] == [6, 2, 3]
    assert mapping_report.cut_lines([whole]) == []


def trace(model, word):
    """A word in a trace; where it is several tokens, those after the first are certain in a scripted tree."""
    root, tokens = completed(model.detokenizer, "her ", word)
    first, *rest = [text for _, text in model.detokenizer.pieces(root, tokens)]
    return " > 100.00% ".join([f"[{first.strip(' ')}]", *(f"[{text}]" for text in rest)])


def test_probabilities_are_coloured_from_red_to_green(model):
    tree = scripted(model, "down her ", [("spine", 0.99)], [("arm", 0.01)])
    found = "\n".join(lines_of(model, tree))
    assert coloured("99.00%", 0.99) in found and coloured("1.00%", 0.01) in found
    codes = [int(coloured("x", share / 100).split(";")[2].split("m")[0]) for share in range(101)]
    assert codes[0] == 196 and codes[-1] == 46 and len(set(codes)) > 5


def test_a_branch_without_a_probable_token_says_so(model):
    tree = scripted(model, "down her ", [("|", None), (" His", 0.05)])
    assert tree.branches[0].length == 0
    assert plain(lines_of(model, tree))[3:6] == [
        "  1. Sequence: His",
        "     Trace:    no next token reaches 10%",
        "     Joint:    100.00%",
    ]


def test_characters_are_whole_and_control_characters_escaped(model):
    tree = scripted(model, "It is ", [("\U0001f642\u65e5", 0.5), ("\x07\x1b[31m\u200b\n\u202e", 0.5)])
    found = plain(lines_of(model, tree))
    text = "\n".join(found)
    assert "\U0001f642" in found[3] and "\u65e5" in found[3] and "\ufffd" not in text
    assert "\\x07\\x1b[31m\\u200b \\u202e" in found[3]
    assert "\\n" in found[4]
    assert all(character.isprintable() for line in found for character in line)


def test_the_table_of_all_phrases():
    rows = [
        standing(better='say "no"'),
        standing("a whole sentence that is too long for it", "", 0.00001, rare=True),
        standing("yes", "line\nbreak", 0.3, kind="GOOD"),
    ]
    lines = mapping_report.phrase_table(rows, Mapper(10.0))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][1:]
    assert cells == [
        ["BAD", "spine", "down her", "50.0%", "", "2 of 3", '"say \\"no\\"" (75.0%)'],
        ["BAD", "...at is too long for it", "", "0.001%", "yes", "2 of 3", ""],
        ["GOOD", "yes", "line break", "30.0%", "", "2 of 3", ""],
    ]
    assert len({len(line) for line in lines if line[0] in "|-"}) == 1
    assert re.findall(r"\d+", lines[-2]) == ["1", "3", "10", "1"]


def test_a_suggestion_can_be_pasted_into_yaml():
    for phrase in ("spine", 'say "no"', "a: b # c", "- x", "yes", "back\\slash", "\U0001f642", "two\nlines\t", "1e3"):
        shown = mapping_report.suggestion(standing(better=phrase))
        assert "\n" not in shown
        assert yaml.safe_load("phrase: " + shown.removesuffix(" (75.0%)")) == {"phrase": phrase}


def test_the_phrase_list_has_the_weights_kinds_and_contexts_of_the_phrases():
    found = yaml.safe_load(
        mapping_report.phrase_list(
            [
                standing("spine", "down her ", better="arm", weight=2.0),
                standing("back", "down her ", better="arm", weight=2.0),
                standing("spine", "down his ", better="arm", weight=2.0),
                standing("leg", "up her ", better="arm"),
                standing("no", "x", kind="BAD"),
                standing("yes", "say ", better="\U0001f642", kind="GOOD"),
            ],
            "a\nmodel",
        )
    )
    assert found == {
        "bad_phrases": [
            {"phrase": "arm", "weight": 2.0, "contexts": ["down her ", "down his "]},
            {"phrase": "arm", "weight": 1.0, "contexts": ["up her "]},
        ],
        "good_phrases": [{"phrase": "\U0001f642", "weight": 1.0, "contexts": ["say "]}],
    }


def test_the_phrase_list_begins_with_what_counts_most():
    """The probabilities in all contexts together, times the weight: 75% in each context here."""
    found = yaml.safe_load(
        mapping_report.phrase_list(
            [
                standing("a", "one ", better="leg"),
                *(standing("b", f"{number} ", better="arm") for number in range(3)),
                standing("c", "two ", better="back", weight=2.0),
                standing("d", "two ", better="back", weight=2.0),  # the same, and not counted twice
            ],
            "model",
        )
    )
    assert [phrase["phrase"] for phrase in found["bad_phrases"]] == ["arm", "back", "leg"]


def test_the_document_says_what_was_cut_and_which_limits_were_set(model):
    tree = scripted(model, "It is ", [("so", 0.5)])
    for cut, limits in ((0, {}), (2, {"max_branches": 6, "min_joint": 1.0})):
        found = mapping_report.document("model", Mapper(**limits), [replace(tree, cut=cut)], [[]], model.detokenizer)
        settings = {"prob_min": 10.0, "top_k": 3, "max_depth": 5, "additional_length": 20}
        assert found["mapper"] == {**settings, **limits}
        assert found["contexts"][0].get("cut") == (cut or None)


def test_the_document_holds_the_whole_tree(model):
    tree = scripted(
        model,
        "It is ",
        [("so", 0.5), (".", 0.5), ("|", None), (" His", 0.25)],
        [("so", 0.5), (" very", 0.25)],
    )
    found = mapping_report.document("model", Mapper(5.0, 2, 3, 4), [tree], [[standing(better="so")]], model.detokenizer)
    assert (found["model"], found["mapper"]["prob_min"], found["mapper"]["top_k"]) == ("model", 5.0, 2)
    (context,) = found["contexts"]
    assert context["context"] == "It is " and context["tokens"] == list(tree.root.tokens)
    assert context["phrases"] == [
        {
            "type": "BAD",
            "phrase": "spine",
            "weight": 1.0,
            "probability": 0.5,
            "place": 2,
            "places": 3,
            "below_prob_min": False,
            "suggestion": {"phrase": "so", "probability": 0.75},
        }
    ]
    nodes, branches = context["nodes"], context["branches"]
    for shown, branch in zip(branches, tree.branches, strict=True):
        path, number = [], shown["end"]
        while number is not None:
            path.append(nodes[number])
            number = nodes[number]["parent"]
        path = path[::-1]
        assert [node["token"] for node in path] == [node.token for node in branch.nodes]
        assert "".join(node["text"] for node in path) == shown["text"] + shown["continuation"]
        assert [node["greedy"] for node in path] == [place >= branch.length for place in range(len(path))]
        own = [node["probability"] for node in path[: branch.length]]
        assert math.prod(own) == pytest.approx(shown["joint_probability"])
        assert path[branch.length - 1]["joint_probability"] == pytest.approx(shown["joint_probability"])
    assert {shown["text"] for shown in branches} == {" so.", " so very"}


@pytest.mark.parametrize(
    "value, shown", [(1.0, "100.00%"), (0.7951, "79.51%"), (0.0001, "0.01%"), (0.00001234, "1.23e-03%"), (0.0, "0.00%")]
)
def test_short_percentages(value, shown):
    assert mapping_report.short_percent(value) == shown
