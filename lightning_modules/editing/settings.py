"""How facts are edited."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from malleable.lightning_modules.editing.fine_tune import FineTuneSettings
from malleable.lightning_modules.editing.prompts import FactToken
from malleable.lightning_modules.editing.targets import TargetSettings
from malleable.lightning_modules.functional.editing.null_space import Threshold

Method = Literal["alpha_edit", "memit", "ridge", "fine_tune"]


@dataclass
class EditSettings:
    """How facts are edited.

    Attributes:
        method: ``alpha_edit`` changes what text does not use; ``memit`` weighs a change by how much text uses it; ``ridge`` weighs all alike
            (AlphaEdit without its projection); ``fine_tune`` descends on the same matrices.
        layers: Layers to change, from below; default: from an eighth to a quarter of the depth.
        ridge: lambda of ``alpha_edit`` and ``ridge``.
        threshold: Which directions ``alpha_edit`` may change.
        moment_weight: Weight of the second moment under ``memit``.
        targets: How target vectors are sought.
        tuning: How ``fine_tune`` descends.
        fact_token: Where a fact is read.
        contexts: Number of beginnings that the model writes itself, after which a fact must hold too.
        seed: Of these.
        batch_size: Facts solved for together.
        remember: Keep what earlier batches gave.
        block: Template of the blocks' names; found by default.
        projection: Template of the projections' names; found by default.

    Source:
        Fang et al. (2025), AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models, arXiv:2410.02355; defaults of the authors'
        code.
    """

    method: Method = "alpha_edit"
    layers: tuple[int, ...] | None = None
    ridge: float = 10.0
    threshold: Threshold = field(default_factory=Threshold)
    moment_weight: float = 15000.0
    targets: TargetSettings = field(default_factory=TargetSettings)
    tuning: FineTuneSettings = field(default_factory=FineTuneSettings)
    fact_token: FactToken = "subject_last"
    contexts: int = 5
    seed: int = 0
    batch_size: int = 100
    remember: bool = True
    block: str | None = None
    projection: str | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        for name, allowed in (("method", get_args(Method)), ("fact_token", get_args(FactToken))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("ridge", "moment_weight"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {self.batch_size}")
        if not 0 <= self.contexts <= 5:
            raise ValueError(f"contexts must lie between 0 and 5, got {self.contexts}")
        if self.layers is not None and (not self.layers or list(self.layers) != sorted(set(self.layers))):
            raise ValueError(f"layers must rise, got {list(self.layers)}")

    @property
    def needs_text(self) -> bool:
        """Whether second moments are needed."""
        return self.method in ("alpha_edit", "memit")
