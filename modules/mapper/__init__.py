"""What the model would say: the completion tree, its ranking, suggestions, the report.

Knows: branching, probabilities, wording. Refuses to know: merging, output folders.
"""
