"""What a run writes: journal, recipe, tables, pictures, model card, the output folder.

Knows: files and wording. Refuses to know: how anything was found.
"""
