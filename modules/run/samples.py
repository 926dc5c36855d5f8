"""Compares the merge's answers with the base's, which were generated at the start.

Knows: which prompts the merge answers, which answers are shown. Refuses to know: how an answer is generated, what is
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

    def __init__(self, context: Context, prompts: Asked, on_tasks: Mapping[str, float] | None = None) -> None:
        """prompts: as the base reads them. on_tasks: the base's scores on the tasks of `eval`."""
        self._context = context
        self._prompts = prompts
        self._on_tasks = dict(on_tasks or {})
        self.seconds = 0.0

    def compare(self, evaluator: Evaluator, name: str = "merge") -> list[Sample]:
        """Generate the merge's answers; returns those to show, with the base's. How all answers differ, and the scores
        on tasks, are added to the evaluator's metrics. name: what messages call the merge."""
        if self._on_tasks:
            evaluator.add(self._on_tasks, score_on_tasks(self._context, name))
        if self._context.config.samples == ():
            return []
        began = time.monotonic()
        console = self._context.console
        config = self._context.config
        shown = self._context.answers.shown
        samples = self._context.answers.samples
        inputs = {answer.prompt: answer.given for answer in (*shown, *samples)}
        console.timed(f"Generating the {name}'s answers to {pluralize(len(inputs), 'prompt')}")
        model = self._context.model
        tokenizer = self._context.tokenizer
        merge_answers: dict[str, Written] = {}
        if inputs:
            with only_warned(console):
                merge_answers = generate_answers(model, tokenizer, inputs, config.random_seed, console)
        compared = [answer for answer in shown if answer.prompt in merge_answers]
        base_counts = self._count(compared, [answer.written for answer in compared])
        merge_counts = self._count(compared, [merge_answers[answer.prompt] for answer in compared])
        evaluator.add(base_counts, merge_counts)
        console.warnings(warnings(base_counts, merge_counts, name))
        displayed = samples or shown[:MOST_SAMPLES]
        comparisons = [
            self._sample(answer, merge_answers[answer.prompt]) for answer in displayed if answer.prompt in merge_answers
        ]
        texts = [[sample.base, sample.merge] for sample in comparisons]
        console.warnings(empty_answers(texts, self._prompts, DEFAULT.tokens))
        self.seconds = time.monotonic() - began
        return comparisons

    def _count(self, answers: Sequence[Answer], texts: Sequence[Written]) -> dict[str, float]:
        visible_texts = [self._visible_text(answer, text) for answer, text in zip(answers, texts, strict=True)]
        return count_answers(visible_texts, [text.ended for text in texts])

    def _sample(self, answer: Answer, merge_answer: Written) -> Sample:
        answers = {"base": answer.written, "merge": merge_answer}
        texts = {model: self._visible_text(answer, text) for model, text in answers.items()}
        broken_off = tuple(model for model, text in answers.items() if not text.ended)
        return Sample(prompt=answer.prompt, broken_off=broken_off, **texts)

    def _visible_text(self, answer: Answer, text: Written) -> str:
        return visible(self._context.tokenizer, text, answer.prompt, self._prompts)
