"""What is measured of a model, a metric a file. What its METRIC gives appears in journal, recipe, tables and card.

Knows: how each metric is measured and shown. Refuses to know: files, what is decided.
"""
