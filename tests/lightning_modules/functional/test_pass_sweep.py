"""Every causal language model that transformers ships, pass by pass: none computes another function than plain passes.

The table of the forms is in ``configs/base/MODELS.md``; ``python tests/lightning_modules/functional/test_pass_sweep.py`` runs all models and
rewrites it. The slow test runs half of them; the halves alternate daily. ``MALLEABLE_SWEEP=0``, ``1`` or ``all`` chooses.
"""

import datetime
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))  # run as a script

from architectures import causal_kinds, pass_errors, tiny_model

from malleable.lightning_modules.functional.language.pass_forms import pass_forms

TOLERANCE = 3e-4  # weights of the sweep are wide: some models round by more than 1e-4
TABLE = Path(__file__).resolve().parents[3] / "configs" / "base" / "MODELS.md"
START, END = "<!-- forms -->", "<!-- end of forms -->"
PARTS = 8
COLUMNS = ("shared", "packed", "tree", "cached", "embedding")


def sweep_kind(kind: str, forms_only: bool = False) -> tuple[str, dict[str, float]]:
    """Return the row of a model type in the table, and the passes that are wrong."""
    try:
        model = tiny_model(kind)
        forms = pass_forms(model).describe()
    except Exception as error:
        if "attends to later tokens" in str(error):
            return f"| {kind} |" + " refused |" * len(COLUMNS), {}
        reason = str(error).splitlines()[0].replace("|", "/")[:60] if str(error) else type(error).__name__
        return f"| {kind} | not built: {reason} |" + " |" * (len(COLUMNS) - 1), {}
    wrong = {} if forms_only else {name: error for name, error in pass_errors(model).items() if not isinstance(error, str) and not error <= TOLERANCE}
    return f"| {kind} | " + " | ".join(forms[column] for column in COLUMNS) + " |", wrong


def listed_rows() -> dict[str, str]:
    """Return the rows of the documented table by model type."""
    text = TABLE.read_text(encoding="utf-8")
    rows = text[text.index(START) : text.index(END)].splitlines()
    return {row.split("|")[1].strip(): row for row in rows if row.startswith("| ") and not row.startswith("| model")}


def representatives(half: str | None = None) -> list[str]:
    """Return the listed model types of a half (``0``, ``1``) or of ``all``: of those with the same forms, every second one is in each half.

    Args:
        half: Default: ``MALLEABLE_SWEEP``, else the parity of the day.
    """
    half = half or os.environ.get("MALLEABLE_SWEEP") or str(datetime.date.today().toordinal() % 2)
    if half not in ("0", "1", "all"):
        raise ValueError(f"MALLEABLE_SWEEP must be 0, 1 or all, got {half!r}")
    groups: dict[str, list[str]] = {}
    for kind, row in listed_rows().items():
        groups.setdefault(row.split("|", 2)[2], []).append(kind)
    # A form that only one model has would be in one half only.
    chosen = (kinds if half == "all" or len(kinds) == 1 else kinds[int(half) :: 2] for kinds in groups.values())
    return sorted(kind for kinds in chosen for kind in kinds)


def test_the_table_lists_every_causal_model_type():
    """A model type that is missing has not been compared; ``not built`` is a row, too."""
    installed, listed = set(causal_kinds()), set(listed_rows())
    assert installed == listed, (
        f"missing in {TABLE.name}: {sorted(installed - listed)}; no longer in transformers: {sorted(listed - installed)}; "
        f"run python {Path(__file__).name}, which rewrites the table"
    )


def test_every_model_type_is_in_a_half(monkeypatch):
    assert set(representatives("0")) | set(representatives("1")) == set(representatives("all")) == set(listed_rows())
    assert len(representatives("0")) < 0.6 * len(listed_rows())
    monkeypatch.setenv("MALLEABLE_SWEEP", "both")
    with pytest.raises(ValueError, match="MALLEABLE_SWEEP must be 0, 1 or all, got 'both'"):
        representatives()


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_passes_of_every_architecture_equal_reference_passes(part):
    """Compare the half of the day."""
    listed, problems = listed_rows(), []
    for kind in representatives()[part::PARTS]:
        row, wrong = sweep_kind(kind)
        problems += [f"{kind}: {wrong}"] if wrong else []
        problems += [f"listed: {listed[kind]}\n   found: {row}"] if listed[kind] != row else []
    assert not problems, "\n".join(problems)


if __name__ == "__main__":
    rows = []
    for kind in causal_kinds():
        row, wrong = sweep_kind(kind, forms_only="--forms" in sys.argv)
        rows.append(row)
        print(row, wrong or "", flush=True)  # noqa: T201
    head = [START, "| model type | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (len(COLUMNS) + 1)]
    text = TABLE.read_text(encoding="utf-8")
    TABLE.write_text(text[: text.index(START)] + "\n".join([*head, *rows, ""]) + text[text.index(END) :], encoding="utf-8")
