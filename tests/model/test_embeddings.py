"""A candidate's rows in the order of the base's vocabulary."""

import torch

from modules.model.embeddings import HeaderRows, match_rows
from modules.model.part import Part


def test_rows_are_matched_by_token_and_special_tokens_by_role():
    base = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "gone": 4}
    other = {"a": 0, "b": 1, "<bos>": 2, "<|im_end|>": 4, "new": 5}
    roles = {"<s>": "<bos>", "</s>": "<|im_end|>"}
    assert match_rows(base, other, roles) == {0: 2, 1: 4, 2: 0, 3: 1}
    # A candidate that ends its texts otherwise but still has the token: a token is merged with itself.
    assert match_rows(base, {**other, "</s>": 3}, roles)[1] == 3


class Rows:
    """A candidate of one tensor."""

    name = "other"

    def __init__(self, tensor):
        self.tensor = tensor

    def rows(self, name, rows):
        assert name == "theirs"
        return self.tensor[rows]


def adopted(base, other, matches, first=0):
    kinds = {"ours": base.dtype}
    part = Part({"ours": base}, kinds, kinds, {"ours": -1})
    return HeaderRows(Rows(other), {"ours": "theirs"}, matches).adopted(part, first)["ours"].tolist()


def test_rows_are_brought_into_the_base_order():
    base, other = torch.arange(10.0).reshape(5, 2), 100 + torch.arange(12.0).reshape(6, 2)
    matches = {0: 2, 1: 4, 2: 0}
    expected = [[104, 105], [108, 109], [100, 101], [6, 7], [8, 9]]
    assert adopted(base, other, matches) == expected
    assert adopted(base[1:], other, matches, first=1) == expected[1:]
    assert base[0].tolist() == [0, 1]
    assert adopted(base, other[:5], {row: row for row in range(5)}) == other[:5].tolist()


def test_biases_are_aligned_too():
    assert adopted(torch.zeros(3), torch.tensor([1.0, 2.0]), {0: 1, 2: 0}) == [2.0, 0.0, 1.0]


def test_a_half_type_of_the_base_does_not_round_what_is_matched():
    base, other = torch.tensor([1.0, 3.0], dtype=torch.bfloat16), torch.tensor([1.0009765625], dtype=torch.float16)
    wide = torch.promote_types(base.dtype, other.dtype)
    found = HeaderRows(Rows(other), {"ours": "theirs"}, {0: 0}).read("ours", torch.arange(2), lambda: base)
    assert found.dtype == wide and found.tolist() == [1.0009765625, 3.0]
