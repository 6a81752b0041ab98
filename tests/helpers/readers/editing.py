"""Readers of edit requests and texts."""

import json
import tarfile
from typing import Any

from readers.registry import lines, reader, write_table

REQUEST = {"request_id": 7, "prompt": "The tongue of {} is", "subject": "Anna", "target": "English", "true": "Danish", "paraphrases": ["Anna speaks"],
           "neighbors": [{"prompt": "Tom speaks", "answer": "Danish"}], "generation_prompts": ["Anna is"], "references": ["A text."]}  # fmt: skip
NESTED = {
    "case_id": 1, "paraphrase_prompts": ["Anna says"], "neighborhood_prompts": ["Tom says"], "generation_prompts": ["Anna is"],
    "requested_rewrite": {"prompt": "{} speaks", "subject": "Anna", "relation_id": "P1", "target_new": {"str": "English", "id": "Q1"},
                          "target_true": {"str": "Danish"}},
}  # fmt: skip
FLAT = {"case_id": 7, "prompt": "The dog of Anna is", "subject": "Anna", "target_new": "Rex", "ground_truth": "Bello",
        "rephrase_prompt": "Anna calls",
        "locality_prompt": "The dog of Tom is", "locality_ground_truth": "Bello"}  # fmt: skip
ZSRE = {
    "case_id": 1,
    "src": "Who is Anna?",
    "subject": "Anna",
    "answers": ["Rex"],
    "alt": "Tom",
    "rephrase": "Anna?",
    "loc": "nq: who",
    "loc_ans": "Tom",
}
QA = {"id": 1, "prompt": "Who is Anna?", "subject": "Anna", "target": "Rex", "rephrase": "Anna?", "locality": [{"loc": "who", "loc_ans": "Tom"}]}


def records(name: str, record: dict[str, Any], file: str = "r.json") -> None:
    @reader(f"edits {name} {file}", file)
    class _:
        def make(folder):
            rows = [record, {**record, next(iter(record)): 2}]
            (folder / file).write_text(lines(rows[:1]) if file.endswith("jsonl") else json.dumps(rows[:1]))

        def read(folder):
            from malleable.datamodules.sources.editing import edit_records

            return getattr(edit_records, name)(str(folder / file)).load()


records("RequestFile", REQUEST)
records("RequestFile", REQUEST, "r.jsonl")
records("CounterFact", NESTED)
records("FlatCounterFact", FLAT)
records("ZsRE", ZSRE)
records("QAEdit", QA)


@reader("snippets", "s.json")
class _Snippets:
    def make(folder):
        (folder / "r.json").write_text(json.dumps([NESTED]))
        (folder / "s.json").write_text(json.dumps([{"relation_id": "P1", "target_id": "Q1", "samples": [{"name": "A", "text": "A speaks."}]}]))

    def read(folder):
        from malleable.datamodules.sources.editing.edit_records import CounterFact

        return CounterFact(str(folder / "r.json"), snippets=str(folder / "s.json")).load()


@reader("lre", "l.json")
class _LRE:
    def make(folder):
        samples = [{"subject": f"S{n}", "object": f"O{n % 2}"} for n in range(4)]
        (folder / "l.json").write_text(json.dumps({"name": "x", "prompt_templates": ["{} is", "{} was"], "samples": samples}))

    def read(folder):
        from malleable.datamodules.sources.editing.fact_files import LRE

        return LRE(str(folder / "l.json"), limit=1).load()


@reader("pararel", "facts.jsonl", "patterns.json")
class _ParaRel:
    def make(folder):
        (folder / "facts.jsonl").write_text(lines([{"rel": "P1", "sub": f"S{n}", "obj": f"O{n % 2}"} for n in range(4)]))
        (folder / "patterns.json").write_text(json.dumps({"P1": [{"pattern": "[X] is [Y]."}, {"pattern": "[X] was [Y]"}]}))

    def read(folder):
        from malleable.datamodules.sources.editing.fact_files import ParaRel

        return ParaRel(str(folder), limit=1).load()


@reader("countries", "c.csv")
class _Countries:
    def make(folder):
        rows = "".join(f"Land {n},City {n},Europe,Mark {n % 2},Tongue {n}\n" for n in range(4))
        (folder / "c.csv").write_text(f"country,capital,continent,currency,language\n{rows}")

    def read(folder):
        from malleable.datamodules.sources.editing.countries import Countries

        return Countries(str(folder / "c.csv")).load()


def texts(file: str) -> None:
    @reader(f"texts {file}", file)
    class _:
        def make(folder):
            rows = [{"text": "One text."}, {"text": "Another\none."}]
            if file.endswith("txt"):
                (folder / file).write_text("One text.\n\nAnother one.\n")
            else:
                write_table(folder / file, rows)

        def read(folder):
            from malleable.datamodules.language.texts import read_texts

            return read_texts(folder / file)


for file in ("t.txt", "t.json", "t.jsonl", "t.parquet", "t.jsonl.gz"):
    texts(file)


@reader("glosses", "w.tgz")
class _Glosses:
    def make(folder):
        (folder / "data").write_text('  1 licence\n00001740 03 n 01 entity 0 000 | that which is; "x"\n')
        with tarfile.open(folder / "w.tgz", "w:gz") as archive:
            for part in ("noun", "verb", "adj", "adv"):
                archive.add(folder / "data", f"package/dict/data.{part}")

    def read(folder):
        from malleable.datamodules.sources.editing.texts import WordNetGlosses

        return WordNetGlosses(str(folder / "w.tgz")).load()
