"""Where the words of a text and those of soft prompts stand together; B rows, T words, L extra."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Gaps = tuple[int, int, int]  # words before the text, between its two segments, after it


class Spread(NamedTuple):
    """Places of T words of a text and L others in rows of W = T + L; B is 1 where rows are alike.

    Attributes:
        source: (B, W) for every place the word of the text whose marks hold there: its own, or
            for an extra word those of its neighbour.
        text: (B, T) the place of every word of the text.
        extra: (B, L) the place of every extra word.
    """

    source: Tensor
    text: Tensor
    extra: Tensor

    @property
    def width(self) -> int:
        """W, words in a row."""
        return self.source.shape[1]

    def fill(self, x: Tensor, value: int) -> Tensor:
        """Marks (B, T) as (B, W), `value` where extra words stand."""
        rows = max(len(x), len(self.text))
        wide = x.new_full((rows, self.width), value)
        return wide.scatter(1, self.text.expand(rows, -1), x.expand(rows, -1))

    def repeat(self, x: Tensor) -> Tensor:
        """Marks or features (B, T, …) as (B, W, …); an extra word has those of its neighbour."""
        rows = max(len(x), len(self.source))
        return x.expand(rows, *x.shape[1:]).gather(1, _like(self.source, x, rows))

    def positions(self, p: Tensor) -> Tensor:
        """Positions (…, T) as (…, W): counted on from the text's first through all words."""
        rows = torch.broadcast_shapes(p.shape[:-1], self.source.shape[:1])
        source = self.source.expand(*rows, -1)
        shift = torch.arange(self.width, device=p.device) - source
        return p.expand(*rows, -1).gather(-1, source) + shift

    def put(self, x: Tensor, words: Tensor) -> Tensor:
        """Features x (B, W, D) with `words` (L, D), or (B, L, D), where extra words stand."""
        where = _like(self.extra, x, len(x))
        return x.scatter(1, where, words.expand(len(x), -1, -1))

    def cut(self, y: Tensor) -> Tensor:
        """Features (B, W, …) of the text's words alone (B, T, …)."""
        return y.gather(1, _like(self.text, y, len(y)))


def _like(index: Tensor, x: Tensor, rows: int) -> Tensor:
    """An index (B, n) into places as one into x (B, W, …): (rows, n, …)."""
    flat = index.to(x.device).view(*index.shape, *[1] * (x.dim() - 2))
    return flat.expand(rows, -1, *x.shape[2:])


def spread(gaps: Gaps, size: int, start: Tensor, middle: Tensor, end: Tensor) -> Spread:
    """Extra words put in three gaps of texts of `size` words: before words start, middle, end (B,).

    `start` is at most `middle` and `middle` at most `end`; `end` may be `size`.
    """
    points = [at.unsqueeze(1) for at in (start, middle, end)]
    word = torch.arange(size, device=start.device)
    text = word + sum(count * (word >= at) for count, at in zip(gaps, points, strict=True))
    before = torch.cat([at.expand(-1, n) for at, n in zip(points, gaps, strict=True)], 1)  # (B, L)
    extra = before + torch.arange(sum(gaps), device=start.device)
    neighbour = (before - 1).maximum(points[0]).clamp(max=size - 1)
    source = text.new_empty(len(text), size + sum(gaps))
    source = source.scatter(1, text, word.expand_as(text)).scatter(1, extra, neighbour)
    return Spread(source, text, extra)


def alike(length: int, size: int, at: int, device: torch.device) -> Spread:
    """`length` extra words before word `at` of every text of `size` words."""
    where = torch.full((1,), at, device=device)
    return spread((length, 0, 0), size, where, where, where)


def bounds(mask: Tensor) -> tuple[Tensor, Tensor]:
    """First real word, and the place after the last one, of each row of a mask (B, T): (B,) each.

    A row without real words has both at T or 0; nothing reads what stands there.
    """
    real = mask != 0
    start = (real.cumsum(1) == 0).sum(1)
    end = mask.shape[1] - (real.flip(1).cumsum(1) == 0).sum(1)
    return start, end.maximum(start)


def boundary(
    start: Tensor,
    end: Tensor,
    ids: Tensor | None,
    types: Tensor | None,
    separators: tuple[int, ...],
) -> Tensor:
    """Where the second segment of each row begins (B,).

    That is the first word of type 1, else the word after the first separator, else the start of
    the text: what would stand between segments stands before a text that has but one.
    """
    middle = start
    if ids is not None and separators:
        marks = torch.stack([ids == one for one in separators]).any(0)
        middle = _first(marks, start, end, 1)
    if types is not None:
        second = _first(types > 0, start, end, 0)
        middle = torch.where(second > start, second, middle)
    return middle


def _first(marks: Tensor, start: Tensor, end: Tensor, step: int) -> Tensor:
    """The first marked real word of each row plus `step`; `start` where there is none."""
    word = torch.arange(marks.shape[1], device=marks.device)
    inside = (word >= start.unsqueeze(1)) & (word < end.unsqueeze(1)) & marks
    return torch.where(inside.any(1), inside.int().argmax(1) + step, start)
