"""Small things that many tests share: a catalogue, rows, a language model of a few thousand weights."""

from malleable.datamodules.batch import AnswerBatch, Batch, Catalog, Example, PackedBatch, PreferenceBatch, Vocabulary
from malleable.datamodules.collate import collate
from malleable.lightning_modules.language.config import LanguageModelConfig, Scratch

EOS = 1
TITLES = ("Alien", "Aliens", "Brazil", "Casablanca", "Dune", "Fargo", "Heat", "Jaws")
TOKENS = ((4, 5, EOS), (4, 5, 6, EOS), (7, EOS), (8, 9, 10, EOS), (8, 11, EOS), (12, EOS), (13, 14, EOS), (13, 15, EOS))
KEYS = ("f1", "f2", "f3", "f4", "f5", "f6", "f7", "f8")
GENRES = (("horror",), ("horror", "action"), ("comedy",), ("drama",), ("action",), ("drama", "comedy"), ("action",), ("horror",))


def tiny_catalog() -> Catalog:
    """Eight films, among them one whose title begins another's."""
    return Catalog(TITLES, TOKENS, GENRES, popularity=(8, 7, 6, 5, 4, 3, 2, 1), vocabulary=Vocabulary(16, EOS), keys=KEYS)


def tiny_rows(count: int = 24) -> list[Example]:
    """Rows in which the next film follows from the last one: i -> i + 1."""
    rows: list[Example] = []
    for index in range(count):
        history = [(index + step) % 8 for step in range(index % 3 + 1)]
        target = (history[-1] + 1) % 8
        prompt = [2] + [token for item in history for token in TOKENS[item]]
        rows.append({"sample_id": index, "prompt": prompt, "answers": [TOKENS[target]], "item_ids": [target], "history": history, "seen": history})
    return rows


def tiny_config(**changes: object) -> LanguageModelConfig:
    """A Llama of one layer, 16 wide."""
    return LanguageModelConfig(scratch=Scratch(hidden_size=16, num_layers=1, num_heads=2, max_length=64), **changes)  # type: ignore[arg-type]


def batch_of(rows: list, **options: int) -> Batch:
    """Collate rows as what they look like."""
    kind = PackedBatch if "input_ids" in rows[0] else PreferenceBatch if len(rows[0]["answers"]) > 1 else AnswerBatch
    return collate(rows, kind, **options)
