"""What merge_method and strategy can be.

Knows: names, and the one line on each. Refuses to know: what they do. The search registers its functions here, each
where it is written, so these are filled once modules.search has been imported.
"""

METHODS: dict[str, str] = {}  # name -> what it does, as default.yaml prints it
STRATEGIES: dict[str, str] = {}
