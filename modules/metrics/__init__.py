"""The metrics of a model, one in each file. The values of its METRIC appear in journal, recipe, tables and card.

Knows: how each metric is measured and shown. Refuses to know: files, what is decided.
"""
