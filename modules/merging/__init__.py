"""How two tensors become one: the merge methods, each a pure function.

Knows: tensors, ratios, the methods' names and parameters. Refuses to know: models, layers, files, scores.
"""
