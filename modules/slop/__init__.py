"""A model's own cliches ("slop"): what its texts over-use, contexts in which it writes it, and how often it does.

Knows: words, frequencies, ranking, counting, wording. Refuses to know: merging, how texts are sampled and scored.
"""
