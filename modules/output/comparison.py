"""Several finished outputs side by side: their recipes as one table.

Knows: what of a recipe is compared, which totals may be. Refuses to know: files, which metrics there are, how a recipe
came to be.
"""

from collections.abc import Mapping

from modules.metrics.registry import columns_of
from modules.output.recipe import Recipe
from modules.runtime.text import one_line, pluralize, shortened, table

MOST_MODELS = 3  # of a composition, the largest shares
OUTPUT_WIDTH, MODEL_WIDTH = 32, 16  # columns of a name; of a longer one the end is shown


def comparison(recipes: Mapping[str, Recipe]) -> list[str]:
    """A table of outputs, one row each, and which totals may be compared. recipes: by the output's name."""
    columns = columns_of(*(recipe.metrics["merge"] for recipe in recipes.values()))
    rows = []
    for name, recipe in recipes.items():
        largest = list(recipe.composition.items())[:MOST_MODELS]
        strategy = recipe.settings.strategy
        rows.append(
            (
                shortened(name, OUTPUT_WIDTH),
                *(column.text(recipe.metrics["merge"].get(column.name)) for column in columns),
                f"{recipe.improved} of {len(recipe.phrases)}",
                ", ".join(f"{share:.1%} {shortened(model, MODEL_WIDTH)}" for model, share in largest),
                ", ".join(recipe.settings.merge_method),
                f"joint, {pluralize(len(recipe.joint.steps), 'step')}" if recipe.joint else strategy,
                f"{recipe.seconds.get('search', 0):.1f} s",
            )
        )
    labels = [column.label for column in columns]
    header = ("Output", *labels, "Improved", "Composition", "Methods", "Strategy", "Search")
    return [*table(header, rows), *_about_totals(recipes)]


def _about_totals(recipes: Mapping[str, Recipe]) -> list[str]:
    """A line that says which outputs have the same phrases, if not all have: only their totals mean the same."""
    groups: dict[tuple, list[str]] = {}
    for name, recipe in recipes.items():
        # Automatic weights are measured, and differ by a rounding between machines.
        phrases = [(p.kind, p.phrase, p.variants, p.context, p.chat is None, f"{p.weight:.5g}") for p in recipe.phrases]
        groups.setdefault(tuple(sorted(phrases)), []).append(one_line(name))
    if len(groups) < 2:
        return []
    listed = " | ".join(", ".join(names) for names in groups.values())
    return [f"Phrases or weights differ: compare totals only within: {listed}"]
