"""What decides a measurement in context."""

from __future__ import annotations

from dataclasses import dataclass

from espalier.errors import SettingError

CHOICES = ("seed", "similar")


@dataclass(frozen=True)
class InContext:
    r"""How examples are chosen and shown, and how answers are scored.

    Args:
        shots: Examples before each query, fewer where the length limit leaves no room; 0 for none.
        choose: "seed": the same for all queries, in turn from each class; "similar": those whose
            TF-IDF vectors are nearest to the query's, the nearest one last.
        seed: Which examples "seed" takes.
        instruction: A text at the very beginning.
        template: An example, with {text} (and {text_pair}) and, at its end, {label}. By default
            "Text: {text}\nLabel: {label}" for classes, "Question: {text}\nAnswer: {label}" for
            choices, "Input: {text}\nOutput: {label}" for source and target; a prompt and its
            completion stand as they are.
        after: What ends an example.
        words: The words that stand for the classes, in the order of the labels; their names if
            left out.
        calibrate: Take from each class word's log-likelihood what it has after the same examples
            and a query without content, "N/A" (Zhao et al. 2021, arXiv 2102.09690).
        compare: Measure without examples too: its metrics, and what the examples cost.
        max_length: Longest prompt with its answer, in tokens; the model's limit if left out.
        batch: Sequences at once.
    """

    shots: int = 8
    choose: str = "seed"
    seed: int = 0
    instruction: str = ""
    template: str | None = None
    after: str = "\n\n"
    words: tuple[str, ...] | None = None
    calibrate: bool = True
    compare: bool = True
    max_length: int | None = None
    batch: int = 8

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, what: str) -> None:
            if not ok:
                value = getattr(self, name)
                raise SettingError(f"InContext({name}={value!r}): {name} must be {what}")

        def whole(value: object, least: int) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value >= least

        check("shots", whole(self.shots, 0), "a whole number from 0")
        check("choose", self.choose in CHOICES, f"one of {', '.join(CHOICES)}")
        check("seed", whole(self.seed, 0), "a whole number from 0")
        check("batch", whole(self.batch, 1), "a whole number from 1")
        long = self.max_length is None or whole(self.max_length, 2)
        check("max_length", long, "a whole number from 2")
        check("after", isinstance(self.after, str) and bool(self.after), "a text, such as a line")
        known = self.template is None or (
            "{text}" in self.template and self.template.endswith("{label}")
        )
        check("template", known, 'a text with {text} that ends with {label}: "{text} = {label}"')
        object.__setattr__(self, "words", None if self.words is None else tuple(self.words))
