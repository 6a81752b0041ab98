"""How a recommender answers when it plays against itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class Play:
    """How rejected answers are made from the model's own recommendations.

    Attributes:
        decode: ``greedy`` takes the most probable answer (the released code), ``sample`` draws from the model (what the theory asks for),
            ``beam_k_random`` draws among the ``num_beams`` best.
        grounding: ``trie`` decodes among the catalogue's titles only, ``embedding`` writes freely and takes the nearest title,
            ``none`` takes the free text as it is (the released code).
        num_negatives: Rejected answers for each row; more than one needs a multi-negative loss.
        num_beams: Width for ``beam_k_random``, and for several greedy negatives.
        temperature: Of ``sample``.
        top_p: Of ``sample``: keep the most probable tokens up to this mass.
        max_new_tokens: Of free text.
        exclude_seen: Never answer what the user already has.

    Source:
        Gao et al. (2025), SPRec, arXiv:2412.09243, Section 4.
    """

    decode: Literal["greedy", "sample", "beam_k_random"] = "greedy"
    grounding: Literal["trie", "embedding", "none"] = "trie"
    num_negatives: int = 1
    num_beams: int = 10
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 32
    exclude_seen: bool = False

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for name in ("num_negatives", "num_beams", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}; use decode='greedy' for the most probable answer")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.decode == "beam_k_random" and self.num_beams < self.num_negatives:
            raise ValueError(f"num_beams {self.num_beams} must be at least num_negatives {self.num_negatives}")
        if self.grounding != "trie" and (self.num_negatives > 1 or self.decode == "beam_k_random"):
            raise ValueError(f"grounding '{self.grounding}' writes one free answer a row; several negatives or beams need grounding 'trie'")
