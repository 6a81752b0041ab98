"""Settings of edits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from malleable.lightning_modules.editing.fine_tune import FineTuneSettings
from malleable.lightning_modules.editing.prompts import FactToken
from malleable.lightning_modules.editing.targets import TargetSettings
from malleable.lightning_modules.functional.editing.null_space_threshold import Threshold
from malleable.lightning_modules.functional.number_checks import check_numbers

Method = Literal["alpha_edit", "memit", "ridge", "fine_tune"]


@dataclass
class EditSettings:
    """Method and hyper-parameters of edits.

    Attributes:
        method: ``alpha_edit`` restricts the update to the null space of the keys of text; ``memit`` penalises the update in proportion to the second
            moment of these keys; ``ridge`` penalises all directions equally (AlphaEdit without the projection); ``fine_tune`` trains the same
            matrices by gradient descent.
        layers: Layers to edit, in ascending order. Default: from 1/8 to 1/4 of the depth.
        ridge: Ridge parameter lambda of ``alpha_edit`` and ``ridge``.
        threshold: Threshold of the null space of ``alpha_edit``.
        moment_weight: Weight of the second moment in ``memit``.
        targets: Optimisation of target vectors.
        tuning: Optimisation of ``fine_tune``.
        fact_token: Token of a prompt at which the fact is edited.
        contexts: Number of generated contexts, 0 to 5. Each prompt is edited without a context and in these contexts.
        seed: Seed of the generation of contexts.
        batch_size: Number of facts in a batch, which are edited by one update.
        preserve_past: Preserve the facts of earlier batches.
        block: Template of the module names of blocks, such as ``model.layers.{}``. Default: found automatically.
        projection: Template of the module names of projections, such as ``model.layers.{}.mlp.down_proj``. Default: found automatically.

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
    preserve_past: bool = True
    block: str | None = None
    projection: str | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        for name, allowed in (("method", get_args(Method)), ("fact_token", get_args(FactToken))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        check_numbers(self, above={"ridge": 0, "moment_weight": 0}, at_least={"batch_size": 1, "contexts": 0}, at_most={"contexts": 5})
        if self.layers is not None and (not self.layers or list(self.layers) != sorted(set(self.layers))):
            raise ValueError(f"layers must be in ascending order without duplicates, got {list(self.layers)}")

    @property
    def needs_text(self) -> bool:
        """Whether the method needs second moments of text."""
        return self.method in ("alpha_edit", "memit")
