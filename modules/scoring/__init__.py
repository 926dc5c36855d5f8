"""Phrases to tokens to packs to log-probabilities, by whole forwards and tail forwards; drift, gradients and samples.

Knows: tokenizers, packs, the model's forward. Refuses to know: merging, strategies, what a score is good for.
"""
