"""Completions that no model has to make: trees and tokens from words."""

import math

import tiny

from modules.mapper.completion_tree import Branch, CompletionTree, Node
from modules.mapper.detokenize import Detokenizer
from modules.scoring.tokenization import encode_contexts, encode_pair


class TokenizerOnly:
    """What `scripted` needs of a model: its tokenizer and the size of its vocabulary."""

    def __init__(self):
        self.tokenizer = tiny.bpe_tokenizer()
        self.resident = self
        self.vocabulary = len(self.tokenizer)
        self.detokenizer = Detokenizer(self.tokenizer, self.vocabulary)


def scripted(model, context, *branches):
    """A tree as if the model had said these branches: words, or token ids, "|" before the continuation."""
    root = encode_contexts(model.tokenizer, [context], model.resident.vocabulary)[0]
    found = []
    for branch in branches:
        text, nodes, length, joint = "", [], None, 0.0
        for word, probability in branch:
            if word == "|":
                length = len(nodes)
                continue
            if isinstance(word, str):
                text += word
                tokens = encode_pair(model.tokenizer, context, text).tokens[len(root.tokens) + len(nodes) :]
            else:
                tokens = [word]
            for number, token in enumerate(tokens):
                log_probability = math.log(1.0 if number else probability)
                joint += log_probability
                nodes.append(Node(token, log_probability, joint))
        found.append(Branch(tuple(nodes), len(nodes) if length is None else length))
    return CompletionTree(root, tuple(sorted(found, key=lambda branch: -branch.joint)))


def completed(detokenizer, context, phrase):
    """The context's root and the tokens of a phrase behind it."""
    root = encode_contexts(detokenizer._tokenizer, [context], detokenizer._vocabulary)[0]
    encoded = encode_pair(detokenizer._tokenizer, context, phrase)
    assert encoded.tokens[: encoded.start] == root.tokens
    return root, list(encoded.tokens[encoded.start :])
