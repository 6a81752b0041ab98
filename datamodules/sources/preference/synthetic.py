"""Small synthetic questions with a right and a wrong answer; generated in memory, without terms of use."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path

import numpy as np

from malleable.datamodules.sources.preference.base import PreferenceRow, PreferenceSource, PreferenceTables

# A question, and the answer to each of its subjects. Answers of the same kind of question are the wrong answers of the others.
_COLOURS = {"grass": "green", "snow": "white", "coal": "black", "blood": "red", "the sky": "blue", "a lemon": "yellow", "a plum": "purple"}
_SOUNDS = {"a dog": "bark", "a cat": "meow", "a cow": "moo", "a duck": "quack", "a lion": "roar", "a sheep": "bleat", "a frog": "croak"}
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven")
_SUMS = dict(pairwise(_NUMBERS))
_QUESTIONS = (
    ("What colour is {}?", _COLOURS),
    ("Name the colour of {}.", _COLOURS),
    ("Which sound makes {}?", _SOUNDS),
    ("Name the sound of {}.", _SOUNDS),
    ("What is one more than {}?", _SUMS),
    ("Which number follows {}?", _SUMS),
)
_OPENINGS = ("", "Please answer. ", "A question: ", "Be brief. ", "One word only. ", "Quick: ", "Tell me. ", "Think first. ")


class SyntheticPreferences(PreferenceSource):
    """Questions about colours, sounds and numbers, with a right and a wrong answer of the same kind.

    There are 384 prompts: 48 questions about 24 facts, each with 8 openings. A model that learns the facts also answers prompts of held-out rows.

    Args:
        num_rows: Number of rows, at most 2,784; rows of the same prompt have different wrong answers.
        seed: Seed of all random choices.
        unpaired: Generate unpaired rows: a right or a wrong answer, with its label.

    Raises:
        ValueError: If ``num_rows`` is out of range.
    """

    def __init__(self, num_rows: int = 600, seed: int = 0, unpaired: bool = False) -> None:
        triples = list(_triples())
        if not 1 <= num_rows <= len(triples):
            raise ValueError(f"num_rows must be between 1 and {len(triples)}, got {num_rows}")
        self.num_rows, self.seed, self.unpaired = num_rows, seed, unpaired

    def files(self) -> list[Path]:
        """Return ``[]``: the data are generated from the settings."""
        return []

    def settings(self) -> dict[str, object]:
        """Return the arguments."""
        return dict(vars(self))

    def load(self) -> PreferenceTables:
        """Generate the rows."""
        rng = np.random.default_rng(self.seed)
        triples = list(_triples())
        rows = []
        for number, chosen in enumerate(rng.permutation(len(triples))[: self.num_rows], start=1):
            prompt, right, wrong = triples[chosen]
            place = f"SyntheticPreferences, row {number}"
            if self.unpaired:
                desirable = bool(rng.random() < 0.5)
                rows.append(PreferenceRow(prompt, (right if desirable else wrong,), place, desirable))
            else:
                rows.append(PreferenceRow(prompt, (right, wrong), place))
        return PreferenceTables({"train": rows})


def _triples() -> list[tuple[str, str, str]]:
    """Return prompt, right answer and wrong answer of all rows."""
    return [
        (opening + question.format(subject), f" {right}", f" {wrong}")
        for opening, (question, facts) in product(_OPENINGS, _QUESTIONS)
        for subject, right in facts.items()
        for wrong in facts.values()
        if wrong != right
    ]
