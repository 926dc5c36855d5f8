"""Several finished outputs side by side: their recipes as one table.

Knows: what of a recipe is compared, which totals may be. Refuses to know: files, how a recipe came to be.
"""

from collections.abc import Mapping

from modules.output.recipe import Recipe
from modules.runtime import columns, fit, percent, row
from modules.search import Shares

# The widest that a column gets; of a longer text the end is shown.
NAME_WIDTH, COMPOSITION_WIDTH, METHODS_WIDTH, OTHER_WIDTH = 32, 56, 20, 16
_MODEL_WIDTH = 20  # of a model's name within a composition

_COLUMNS = {
    "Output": NAME_WIDTH,
    "Total before": OTHER_WIDTH,
    "Total after": OTHER_WIDTH,
    "Improved": OTHER_WIDTH,
    "Composition": COMPOSITION_WIDTH,
    "Taken": OTHER_WIDTH,
    "Methods": METHODS_WIDTH,
    "Strategy": OTHER_WIDTH,
    "Search": OTHER_WIDTH,
    "Overall": OTHER_WIDTH,
}
_NOTE = "Total: bad - good, lower is better - Improved: phrases - Taken: candidates of which something was accepted"


def comparison(recipes: Mapping[str, Recipe]) -> list[str]:
    """A table of outputs, one row each, and which totals may be compared. recipes: by the output's name."""
    rows = [list(_COLUMNS), *(_cells(name, recipe) for name, recipe in recipes.items())]
    by_column = zip(*rows, strict=True)
    widths = [min(most, max(map(columns, cells))) for most, cells in zip(_COLUMNS.values(), by_column, strict=True)]
    header, *body = [row(cells, widths) for cells in rows]
    rule = "-" * len(header)
    return [rule, header, rule, *body, rule, _NOTE, *_about_totals(recipes)]


def _cells(name: str, recipe: Recipe) -> list[str]:
    """One row, in the order of the columns."""
    settings, seconds = recipe.settings, recipe.seconds
    threshold = f" {settings.strategy_threshold:g}" if settings.strategy == "quantitive" else ""
    return [
        name,
        percent(recipe.total.before),
        percent(recipe.total.after),
        f"{recipe.improved} of {len(recipe.phrases)}",
        _short(recipe.composition),
        f"{len(recipe.needed_sources) - 1} of {len(recipe.sources) - 1}",
        ", ".join(settings.merge_method),
        settings.strategy + threshold,
        f"{seconds.get('search', 0):.1f} s",
        f"{sum(map(float, seconds.values())):.1f} s",
    ]


def _short(shares: Shares) -> str:
    """As many models as there is room for, the largest first, and how many more there are."""
    parts = [f"{share * 100.0:.1f}% {fit(name, min(columns(name), _MODEL_WIDTH))}" for name, share in shares.items()]
    for count in range(len(parts), 0, -1):
        more = f" and {len(parts) - count} more" if count < len(parts) else ""
        text = ", ".join(parts[:count]) + more
        if columns(text) <= COMPOSITION_WIDTH:
            return text
    return f"{len(parts)} models"


def _about_totals(recipes: Mapping[str, Recipe]) -> list[str]:
    """A line that says which outputs have the same phrases, if not all have: only their totals mean the same."""
    groups: dict[tuple, list[str]] = {}
    for name, recipe in recipes.items():
        groups.setdefault(_phrase_list(recipe), []).append(fit(name, columns(name)).strip())
    if len(groups) < 2:
        return []
    told = " | ".join(", ".join(names) for names in groups.values())
    return [f"Phrases or weights differ, so totals can't be compared but within: {told}"]


def _phrase_list(recipe: Recipe) -> tuple:
    """What makes totals mean the same. Automatic weights are measured, and differ by a rounding between machines."""
    return tuple(sorted((p.kind, p.phrase, p.context, f"{p.weight:.5g}") for p in recipe.phrases))
