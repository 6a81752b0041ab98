"""Readers of preference data and prompts."""

from readers.registry import reader, write_table

PAIRS = [{"prompt": f"Is it {n}?", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(4)]
CONVERSATIONS = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [[{"role": "assistant", "content": row["rejected"]}], [{"role": "assistant", "content": "no"}]],
    }
    for row in PAIRS
]
UNPAIRED = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True, "smoothing": 0.1} for row in PAIRS]


def preferences(name: str, file: str, rows: list) -> None:
    @reader(f"preferences {name} {file}", file)
    class _:
        def make(folder):
            write_table(folder / file, rows)

        def read(folder):
            from malleable.datamodules.sources.preference.files import PreferenceFile

            return PreferenceFile(str(folder / file)).load()


for file in ("p.jsonl", "p.json", "p.csv", "p.tsv", "p.parquet", "p.jsonl.gz"):
    preferences("pairs", file, PAIRS)
for file in ("p.jsonl", "p.parquet"):
    preferences("conversations", file, CONVERSATIONS)
    preferences("unpaired", file, UNPAIRED)


def prompts(file: str) -> None:
    @reader(f"prompts {file}", file)
    class _:
        def make(folder):
            if file.endswith("txt"):
                (folder / file).write_text("Is it 1?\nIs it 2?\n")
            else:
                write_table(folder / file, [{"prompt": row["prompt"]} for row in CONVERSATIONS])

        def read(folder):
            from malleable.datamodules.preference.prompts import read_prompts

            return read_prompts(folder / file, is_chat=True)


for file in ("q.txt", "q.jsonl", "q.parquet"):
    prompts(file)
