"""The card of an adapter: its README.md, which the hub shows.

Knows: an adapter's facts, how it is loaded. Refuses to know: how it was learned, Markdown.
"""

from modules.output.model_card import card_values, filled, front_matter
from modules.output.recipe import Recipe

CARD = """\
---
${front_matter}
---

# $name

A LoRA adapter of rank $rank for $base, learned with Merge Monster $program from phrase lists alone, in $steps. \
$improved of $phrases improved.

$summary

It was trained to make the bad phrases below less likely and the good ones more likely, and to stay close to the base \
on $texts.

## Metrics

KL, agreement and perplexity are measured on text not used in training; held-out phrases were not used either.

$metrics

## Phrases

Probability of each phrase after its context, in the base and with this adapter. Of more than $most pairs, those \
that changed most.

$phrase_table

$samples

## Use

With PEFT. BASE: the base model's folder or id; PATH: this adapter's. Merging it in half precision loses some of what \
was learned.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("BASE", dtype="float32")
model = PeftModel.from_pretrained(model, "PATH")
model = model.merge_and_unload()  # a model without adapters
tokenizer = AutoTokenizer.from_pretrained("BASE")
```

With Merge Monster it is a candidate like any other:

```yaml
models_to_merge:
- PATH
```

## Licence

$licence

## Settings

Non-default settings; `merge_monster.yaml` beside this page has them with all phrases:

$settings
"""


def adapter_card(recipe: Recipe, name: str, texts: str, licence: str | None) -> str:
    """The text of an adapter's card. name: the output's. texts: describes the text that was learned from beside the
    phrases. licence: the base's."""
    settings = recipe.settings.learn
    steps = f"{settings.steps} steps of {min(settings.pairs, len(recipe.phrases))} pairs each"
    values = card_values(recipe, name, licence, "adapter") | {
        "front_matter": front_matter(recipe, "peft", "adapter", licence),
        "rank": settings.rank,
        "steps": steps,
        "texts": texts,
    }
    return filled(CARD, values)
