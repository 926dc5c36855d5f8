"""Model files: found, fetched, checked, read and written; adapters; candidates as streams of layers.

Knows: formats, the hub, tensor names. Refuses to know: devices, scores, merging.
"""
