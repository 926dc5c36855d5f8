"""What the merge answers to the prompts that the base has answered at the start.

Knows: which prompts the merge is asked, which answers are shown. Refuses to know: how an answer is generated, what is
counted in it.
"""

import time
from collections.abc import Mapping, Sequence

from modules.metrics.answers import count_answers, warnings
from modules.metrics.evaluator import Evaluator
from modules.metrics.metric import Context
from modules.metrics.own_answers import MOST_SAMPLES, Answer, generate_answers, only_warned
from modules.output.records import Sample
from modules.run.tasks import score_on_tasks
from modules.runtime.text import pluralize
from modules.scoring.chats import Asked
from modules.scoring.samples import DEFAULT, Written, empty_answers, visible


class Samples:
    """Compares the base's answers with the merge's."""

    def __init__(self, context: Context, asked: Asked, on_tasks: Mapping[str, float] | None = None) -> None:
        """asked: the prompts as the base reads them. on_tasks: what the base scores on the tasks of `eval`."""
        self._context = context
        self._asked = asked
        self._on_tasks = dict(on_tasks or {})
        self.seconds = 0.0

    def compare(self, evaluator: Evaluator, what: str = "merge") -> list[Sample]:
        """Answers of base and merge to show; how all answers differ, and what they score on tasks, is added to the
        evaluator's metrics. what: stands in the place of the merge."""
        if self._on_tasks:
            evaluator.add(self._on_tasks, score_on_tasks(self._context, what))
        if self._context.config.samples == ():
            return []
        began = time.monotonic()
        console = self._context.console
        config = self._context.config
        shown = self._context.answers.shown
        samples = self._context.answers.samples
        given = {answer.prompt: answer.given for answer in (*shown, *samples)}
        console.timed(f"Generating the {what}'s answers to {pluralize(len(given), 'prompt')}")
        model = self._context.model
        tokenizer = self._context.tokenizer
        written: dict[str, Written] = {}
        if given:
            with only_warned(console):
                written = generate_answers(model, tokenizer, given, config.random_seed, console)
        compared = [answer for answer in shown if answer.prompt in written]
        of_base = self._counted(compared, [answer.written for answer in compared])
        of_merge = self._counted(compared, [written[answer.prompt] for answer in compared])
        evaluator.add(of_base, of_merge)
        console.warnings(warnings(of_base, of_merge, what))
        chosen = samples or shown[:MOST_SAMPLES]
        found = [self._sample(answer, written[answer.prompt]) for answer in chosen if answer.prompt in written]
        texts = [[sample.base, sample.merge] for sample in found]
        console.warnings(empty_answers(texts, self._asked, DEFAULT.tokens))
        self.seconds = time.monotonic() - began
        return found

    def _counted(self, answers: Sequence[Answer], texts: Sequence[Written]) -> dict[str, float]:
        read = [self._read(answer, text) for answer, text in zip(answers, texts, strict=True)]
        return count_answers(read, [text.ended for text in texts])

    def _sample(self, answer: Answer, written: Written) -> Sample:
        answers = {"base": answer.written, "merge": written}
        texts = {who: self._read(answer, text) for who, text in answers.items()}
        broken_off = tuple(who for who, text in answers.items() if not text.ended)
        return Sample(prompt=answer.prompt, broken_off=broken_off, **texts)

    def _read(self, answer: Answer, text: Written) -> str:
        return visible(self._context.tokenizer, text, answer.prompt, self._asked)
