"""What base and merge answer to the same prompts.

Knows: who is asked when, how long that takes. Refuses to know: how an answer is generated.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from modules.config.schema import Config
from modules.model.base_model import ResidentModel
from modules.output.records import Sample
from modules.runtime.console import Console
from modules.runtime.errors import first_line, without_panics
from modules.runtime.oom import retry_on_oom
from modules.runtime.text import pluralize
from modules.scoring.chats import Asked, has_template
from modules.scoring.samples import SamplingParams, answers


class Samples:
    """Asks the base, and later the merge."""

    def __init__(
        self, config: Config, console: Console, model: ResidentModel, tokenizer: Any, asked: Asked | None = None
    ) -> None:
        """Ask the base now, so that it need not come back. asked: the prompts as it reads them."""
        began = time.monotonic()
        asked = asked or Asked()
        params = SamplingParams(asked=asked)
        self._console = console
        self._answers = partial(answers, model, tokenizer, seed=config.random_seed, params=params)
        prompts = [prompt for prompt in config.prompts if prompt in asked.texts or not has_template(tokenizer)]
        self._of_base = self._ask("base", prompts)
        self.seconds = time.monotonic() - began

    def compared(self) -> list[Sample]:
        """The prompts with what the base has answered, and what the model answers by now."""
        began = time.monotonic()
        of_merge = self._ask("merge", list(self._of_base))
        self.seconds += time.monotonic() - began
        return [Sample(prompt=prompt, base=self._of_base[prompt], merge=merge) for prompt, merge in of_merge.items()]

    def _ask(self, who: str, prompts: Sequence[str]) -> dict[str, str]:
        """What the model answers; nothing, and a warning, where it can't: no reason to lose a merge."""
        if prompts:
            self._console.timed(f"Generating the {who}'s answers to {pluralize(len(prompts), 'prompt')}")
        try:
            with without_panics():
                found, problems = retry_on_oom(lambda: self._answers(prompts))
        except Exception as error:  # of an architecture, of a chat template, of a device
            self._console.warning(f"no samples: {first_line(error)}")
            return {}
        self._console.warnings(problems)
        return found
