"""Several finished outputs side by side: their recipes as one table.

Knows: what of a recipe is compared, which totals may be. Refuses to know: files, which metrics there are, how a recipe
came to be.
"""

from collections.abc import Mapping

from modules.metrics.registry import columns_of
from modules.output.recipe import Recipe
from modules.output.tables import strategy_text
from modules.runtime.text import one_line, pluralize, shortened, table
from modules.search.decision import Shares

MOST_MODELS = 3  # of a composition, the largest shares
OUTPUT_WIDTH, MODEL_WIDTH = 32, 16  # columns of a name; of a longer one the end is shown


def comparison(recipes: Mapping[str, Recipe]) -> list[str]:
    """A table of outputs, one row each, and which totals may be compared. recipes: by the output's name."""
    shown = columns_of(*(recipe.metrics["merge"] for recipe in recipes.values()))
    rows = []
    for name, recipe in recipes.items():
        settings, metrics = recipe.settings, recipe.metrics["merge"]
        strategy = strategy_text(settings.strategy, settings.strategy_threshold)
        rows.append(
            (
                shortened(name, OUTPUT_WIDTH),
                *(column.text(metrics.get(column.name)) for column in shown),
                f"{recipe.improved} of {len(recipe.phrases)}",
                _largest(recipe.composition),
                ", ".join(settings.merge_method),
                f"joint, {pluralize(len(recipe.joint.steps), 'step')}" if recipe.joint else strategy,
                f"{recipe.seconds.get('search', 0):.1f} s",
            )
        )
    labels = [column.label for column in shown]
    header = ("Output", *labels, "Improved", "Composition", "Methods", "Strategy", "Search")
    return [*table(header, rows), *_about_totals(recipes)]


def _largest(shares: Shares) -> str:
    """The models with the largest shares, which come first, and how many more there are."""
    parts = [f"{share:.1%} {shortened(name, MODEL_WIDTH)}" for name, share in list(shares.items())[:MOST_MODELS]]
    more = len(shares) - len(parts)
    return ", ".join(parts) + (f" and {more} more" if more else "")


def _about_totals(recipes: Mapping[str, Recipe]) -> list[str]:
    """A line that says which outputs have the same phrases, if not all have: only their totals mean the same."""
    groups: dict[tuple, list[str]] = {}
    for name, recipe in recipes.items():
        groups.setdefault(_phrase_list(recipe), []).append(one_line(name))
    if len(groups) < 2:
        return []
    listed = " | ".join(", ".join(names) for names in groups.values())
    return [f"Phrases or weights differ: compare totals only within: {listed}"]


def _phrase_list(recipe: Recipe) -> tuple:
    """What makes totals mean the same. Automatic weights are measured, and differ by a rounding between machines."""
    return tuple(
        sorted((p.kind, p.phrase, p.variants, p.context, p.chat is None, f"{p.weight:.5g}") for p in recipe.phrases)
    )
