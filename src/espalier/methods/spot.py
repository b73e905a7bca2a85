"""SPoT, soft prompt transfer (Vu et al. 2022, arXiv 2110.07904): a prompt that starts from others.

    P₀ = Σᵣ aᵣ Pᵣ,   aᵣ = max(simᵣ, 0) / Σ max(sim, 0) over the most alike sources

One source is taken as it is. With several, sim compares each with the target task's own prompt,
all trained for as many steps (10,000) from one recipe: the cosine of mean rows, or the mean cosine
of pairs of rows. From there on it is prompt tuning, and saved it needs its sources no more.
`esp.rank_prompts` ranks sources; the paper also trains from each of the best and keeps the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from espalier.deltas import Delta
from espalier.errors import CheckpointError
from espalier.places import Sites
from espalier.plain.prompt import Prompt, prompt_site
from espalier.plain.transfer import METRICS, mixed, read_prompt
from espalier.recipes import Method, check, recipe


@dataclass(frozen=True)
class SPoT(Method):
    """Prompt tuning that starts from saved prompts.

    Args:
        source: Folder of a saved prompt, or several.
        target: Folder of the target task's own prompt, to weigh several sources by.
        metric: How alike two prompts are: by their "mean" rows, or by all pairs of "words".
        top: How many of the most alike sources to mix; 0 for all.
        length: L, which is that of the sources; 0 reads it from the first.
    """

    learning_rate: ClassVar[float] = 1e-2

    source: str | tuple[str, ...] = ""
    target: str = ""
    metric: str = "mean"
    top: int = 0
    length: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.source, str):
            object.__setattr__(self, "source", tuple(map(str, self.source)))
        folders = self.folders
        check(self, "source", bool(folders) and all(folders), "a folder of a prompt, or several")
        aimed = len(folders) == 1 or bool(self.target)
        check(self, "target", aimed, "a folder where sources are several")
        check(self, "metric", self.metric in METRICS, f"one of {', '.join(METRICS)}")
        check(self, "top", type(self.top) is int and self.top >= 0, "a whole number, or 0 for all")
        check(self, "length", type(self.length) is int and self.length >= 0, "0 or more")
        if not self.length:
            object.__setattr__(self, "length", len(read_prompt(folders[0]).rows))

    @property
    def folders(self) -> tuple[str, ...]:
        """The sources, one or several."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def identity(self) -> bool:
        """Never: every word of the text attends to those of the prompt."""
        return False

    @property
    def words(self) -> int:
        """L, the tokens by which the text must be shorter."""
        return self.length

    def plain(self, deltas: Sequence[Delta] = ()) -> Method:
        """Prompt tuning, which knows nothing of sources."""
        return recipe({"method": "PromptTuning", "length": self.length}).methods[0]

    def deltas(self, model: nn.Module, places: Sites) -> list[Delta]:
        """The prompt, at the model's word embedding or its first block of images."""
        folders = self.folders

        def start(view: Tensor) -> None:
            rows = mixed(folders, self.target, self.metric, self.top, model)
            if rows.shape != view.shape:
                raise CheckpointError(
                    f"the prompt in {folders[0]} has {len(rows)} words of width {rows.shape[1]}, "
                    f"but SPoT(length={self.length}) takes {len(view)} of {view.shape[1]} here"
                )
            view.copy_(rows)

        return [Prompt(prompt_site(model, places), (self.length, 0, 0), start)]
