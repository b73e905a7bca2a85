"""What a task is: how rows become examples, examples a batch, outputs a score.

Tasks are small frozen objects that know their columns and labels and nothing of models or
files. A run keeps `extras()` with the adapter, and `task_from_extras` builds the same task
again where the training data is not at hand.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from espalier.errors import SettingError
from espalier.tasks.rows import Row

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

Example = dict[str, Any]
"""input_ids and labels (lists of int, or one number), perhaps token_type_ids; besides them
`full` (tokens before truncation), `cut` (1 where the answer itself lost tokens) and `chars`
(characters of the answer)."""


class Piece(NamedTuple):
    """A stretch of text, and whether the model learns to write it."""

    text: str
    learned: bool


NOT_FOR_MODELS = ("chars", "heads")
IGNORED = -100
"""The label that no loss looks at."""


@dataclass(frozen=True)
class Task(ABC):
    """One kind of work for a model; the subclasses are final."""

    name: ClassVar[str]
    auto_model: ClassVar[str]
    best: ClassVar[tuple[str, str]]
    """The metric that says which checkpoint is best, and whether "max" or "min" of it is."""
    writes: ClassVar[bool] = False
    """Whether the answers are generated text."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """The columns a person has, by the name the task gives them."""
    labels: tuple[str, ...] | None = None
    """Class names in the order of their numbers, where the task has classes."""

    @abstractmethod
    def read(self, raw: Row, labelled: bool = True) -> Row:
        """The row in the task's own terms, checked; without the answer unless `labelled`.

        Raises:
            DataError: a cell is missing, empty or of the wrong kind; names file and line.
        """

    @abstractmethod
    def key(self, row: Row) -> str:
        """The text by which two rows count as duplicates (the input, not the answer)."""

    @abstractmethod
    def model_settings(self) -> dict[str, Any]:
        """Keywords for `from_pretrained` (num_labels, id2label, label2id, problem_type)."""

    @abstractmethod
    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int | None
    ) -> list[Example]:
        """Examples of at most `max_length` tokens; one per row except for plain text.

        Raises:
            DataError: a row is left without anything to learn; names file and line.
        """

    @abstractmethod
    def collate(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Tensor]:
        """One batch, padded on the right: input_ids and attention_mask [B, T], labels."""

    @abstractmethod
    def predict(self, outputs: Any, batch: Mapping[str, Tensor]) -> list[Any]:
        """One small object per example from a model's outputs; logits are not kept."""

    @abstractmethod
    def references(self, batch: Mapping[str, Tensor]) -> list[Any]:
        """What `score` compares the predictions of this batch with."""

    @abstractmethod
    def score(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        """The task's metrics over all predictions."""

    def doubt(self, predictions: Sequence[Any], references: Sequence[Any]) -> str | None:
        """A sentence where the predictions are of no use, whatever the metrics say; else None."""
        return None

    @abstractmethod
    def decode(self, prediction: Any) -> Any:
        """What a person reads: a label's name, a number, a list of tags."""

    @abstractmethod
    def preview(
        self, row: Row, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None
    ) -> list[Piece]:
        """What a person should see of a row: what the model is given, and what it learns."""

    def classes(self, row: Row) -> list[str]:
        """The names of the classes a row counts for; none where the task has no classes."""
        return []

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """The part of a batch that goes to the model: `model(**task.inputs(batch))`.

        Packed batches get `use_cache=False`: only without a cache does a transformers model
        see from the positions, or from a mask, where one segment ends and the next begins.
        """
        given: dict[str, Any] = {k: v for k, v in batch.items() if k not in NOT_FOR_MODELS}
        mask = given.get("attention_mask")
        if "position_ids" in given or (mask is not None and mask.dim() == 4):
            given["use_cache"] = False
        return given

    def loss(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """What training lowers, a mean over the batch's targets; by default the model's own."""
        return outputs.loss

    def extras(self, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Any]:
        """All that is needed to format and read inputs as in training, as JSON values."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["columns"] = dict(self.columns)
        fields["labels"] = None if self.labels is None else list(self.labels)
        return {"task": self.name, **fields}

    def prompt(
        self, request: Any, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
    ) -> list[int]:
        """Token ids to generate from, formatted exactly as in training.

        Raises:
            SettingError: the task does not generate text.
        """
        raise SettingError(f"a model for {self.name} does not generate text; use predict")

    def answer(self, row: Row) -> str:
        """The text a generating model should have written for `row`.

        Raises:
            SettingError: the task does not generate text.
        """
        raise SettingError(f"a model for {self.name} does not generate text")

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The tokens that end an answer, for `generate(eos_token_id=...)`.

        Raises:
            SettingError: the task does not generate text.
        """
        raise SettingError(f"a model for {self.name} does not generate text")
