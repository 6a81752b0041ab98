"""Every causal language model that transformers ships, pass by pass: none computes another function than plain passes.

The table of the forms is in ``configs/base/MODELS.md``; ``python tests/lightning_modules/functional/test_pass_sweep.py`` runs all models and
rewrites it. The test runs half of them.
"""

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


def representatives() -> list[str]:
    """Return half of the listed model types: of those with the same forms, every second one."""
    groups: dict[str, list[str]] = {}
    known = set(causal_kinds())
    for kind, row in listed_rows().items():
        groups.setdefault(row.split("|", 2)[2], []).append(kind)
    return sorted(kind for kinds in groups.values() for kind in kinds[::2] if kind in known)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_passes_of_every_architecture_equal_reference_passes(part):
    """Run the program for the other half."""
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
