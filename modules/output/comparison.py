"""Several finished outputs side by side: their recipes as one table.

Knows: what of a recipe is compared, which totals may be. Refuses to know: files, how a recipe came to be.
"""

from collections.abc import Mapping

from modules.output.recipe import Recipe
from modules.runtime import columns, counted, fit, percent, row
from modules.search import Shares

COMPOSITION_WIDTH, _OTHER_WIDTH = 56, 16  # the widest that a column gets; of a longer text the end is shown
_WIDTHS = {"Output": 32, "Composition": COMPOSITION_WIDTH, "Methods": 20}
_MODEL_WIDTH = 20  # of a model's name within a composition
_NOTE = "Total: bad - good, lower is better - Improved: phrases - Taken: candidates of which something was accepted"


def comparison(recipes: Mapping[str, Recipe]) -> list[str]:
    """A table of outputs, one row each, and which totals may be compared. recipes: by the output's name."""
    outputs = [_row(name, recipe) for name, recipe in recipes.items()]
    rows = [list(outputs[0]), *(list(cells.values()) for cells in outputs)]
    widths = [min(_WIDTHS.get(cells[0], _OTHER_WIDTH), max(map(columns, cells))) for cells in zip(*rows, strict=True)]
    header, *body = [row(cells, widths) for cells in rows]
    rule = "-" * len(header)
    return [rule, header, rule, *body, rule, _NOTE, *_about_totals(recipes)]


def _row(name: str, recipe: Recipe) -> dict[str, str]:
    """What is said of an output, by column."""
    settings, seconds = recipe.settings, recipe.seconds
    threshold = f" {settings.strategy_threshold:g}" if settings.strategy == "quantitive" else ""
    return {
        "Output": name,
        "Total before": percent(recipe.total.before, rounding=recipe.total.rounding),
        "Total after": percent(recipe.total.after, rounding=recipe.total.rounding),
        "Improved": f"{recipe.improved} of {len(recipe.phrases)}",
        "Composition": _short(recipe.composition),
        "Taken": f"{len(recipe.needed_sources) - 1} of {len(recipe.sources) - 1}",
        "Methods": ", ".join(settings.merge_method),
        "Strategy": f"joint, {counted(len(recipe.joint.steps), 'step')}"
        if recipe.joint
        else settings.strategy + threshold,
        "Search": f"{seconds.get('search', 0):.1f} s",
        "Overall": f"{sum(map(float, seconds.values())):.1f} s",
    }


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
    return tuple(
        sorted((p.kind, p.phrase, p.variants, p.context, p.chat is None, f"{p.weight:.5g}") for p in recipe.phrases)
    )
