"""A candidate's rows in the order of the base's vocabulary."""

import torch

from modules.model.embeddings import align_rows, keep_rows, match_rows


def test_rows_are_matched_by_token_and_special_tokens_by_role():
    base = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "gone": 4}
    other = {"a": 0, "b": 1, "<bos>": 2, "<|im_end|>": 4, "new": 5}
    roles = {"<s>": "<bos>", "</s>": "<|im_end|>"}
    assert match_rows(base, other, roles) == {0: 2, 1: 4, 2: 0, 3: 1}
    # A candidate that ends its texts otherwise but still has the token: a token is merged with itself.
    assert match_rows(base, {**other, "</s>": 3}, roles)[1] == 3


def test_rows_are_brought_into_the_base_order():
    base = torch.arange(10.0).reshape(5, 2)
    other = 100 + torch.arange(12.0).reshape(6, 2)
    matches = {0: 2, 1: 4, 2: 0}
    aligned = align_rows(other, 5, matches)
    keep_rows(base, aligned, matches)
    assert aligned.tolist() == [[104, 105], [108, 109], [100, 101], [6, 7], [8, 9]]
    assert torch.equal(other, 100 + torch.arange(12.0).reshape(6, 2))
    assert torch.equal(base, torch.arange(10.0).reshape(5, 2))


def test_equal_vocabularies_need_no_copy():
    other = torch.ones(5, 2)
    assert align_rows(other, 5, {row: row for row in range(5)}) is other
    assert align_rows(other, 4, {row: row for row in range(4)}) is not other


def test_biases_are_aligned_too():
    base, other = torch.zeros(3), torch.tensor([1.0, 2.0])
    aligned = align_rows(other, 3, {0: 1, 2: 0})
    keep_rows(base, aligned, {0: 1, 2: 0})
    assert aligned.tolist() == [2.0, 0.0, 1.0]
