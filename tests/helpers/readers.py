"""Every reader of files that a user, or a stranger, may give: whole files to begin with, and how they are read."""

import gzip
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from malleable.datamodules.batch import Catalog, KnowledgeGraph


class Reader(NamedTuple):
    """A reader.

    Attributes:
        make: Writes whole files into a folder.
        files: Names of those that are damaged, one at a time.
        read: Reads the folder.
        slow: Factor by which fewer files are damaged.
    """

    make: Callable[[Path], Any]
    files: tuple[str, ...]
    read: Callable[[Path], Any]
    slow: int = 1


READERS: dict[str, Reader] = {}


def reader(name: str, *files: str, slow: int = 1) -> Callable[[Any], Any]:
    """Register a class with functions ``make`` and ``read`` of a folder."""

    def register(cls: Any) -> Any:
        READERS[name] = Reader(cls.make, files, cls.read, slow)
        return cls

    return register


def lines(rows: list[Any]) -> str:
    return "\n".join(json.dumps(row) for row in rows) + "\n"


# --- recommendation ---

EVENTS = [{"user_id": f"u{n % 4}", "item_id": f"i{n % 3}", "timestamp": 1000.0 + n, "rating": n % 5 + 1.0} for n in range(12)]
ITEMS = [{"item_id": f"i{n}", "title": f"Film, {n} (1999)", "genres": ["Crime", "Drama"][: n % 3]} for n in range(4)]


def table(rows: list[dict[str, Any]], delimiter: str) -> str:
    cells = [list(rows[0]), *([("|".join(cell) if isinstance(cell, list) else str(cell)) for cell in row.values()] for row in rows)]
    quote = '"{}"'.format if delimiter == "," else "{}".format
    return "\n".join(delimiter.join(quote(cell) if "," in cell else cell for cell in row) for row in cells) + "\n"


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
        return
    text = {"csv": lambda: table(rows, ","), "tsv": lambda: table(rows, "\t"), "jsonl": lambda: lines(rows), "json": lambda: json.dumps(rows)}
    data = text[name.rpartition(".")[2]]().encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def tables(kind: str) -> None:
    @reader(f"tables {kind}", f"events.{kind}", f"items.{kind}")
    class _:
        def make(folder):
            write_table(folder / f"events.{kind}", EVENTS)
            write_table(folder / f"items.{kind}", ITEMS)

        def read(folder):
            from malleable.datamodules.recommendation.splits import Split, prepare
            from malleable.datamodules.sources.recommendation.tables import Tables

            loaded = Tables(str(folder / f"events.{kind}"), str(folder / f"items.{kind}")).load()
            try:
                return prepare(loaded, Split(min_user_events=1))
            except ValueError as error:  # of the filters, which know no file
                if not str(error).startswith("no row remains"):
                    raise


for kind in ("csv", "tsv", "jsonl", "json", "parquet", "csv.gz"):
    tables(kind)


def movielens(name: str, *files: str) -> None:
    @reader(f"movielens {name}", *files)
    class _:
        def make(folder):
            from malleable.datamodules.sources.recommendation.movielens import GENRES_100K

            ratings = "".join(f"{n % 3}\t{n % 2 + 10}\t{n % 5 + 1}\t88125094{n}\n" for n in range(8))
            contents = {
                "u.data": ratings,
                "u.item": "".join(f"{n}|Heat {n} (1995)|01-Jan-1995||http://x|{'|'.join('01'[n % 2] for _ in GENRES_100K)}\n" for n in (10, 11)),
                "ratings.dat": ratings.replace("\t", "::"),
                "movies.dat": "10::Heat (1995)::Action|Comedy\n11::Alien (1979)::unknown\n",
                "a.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + ratings,
                "a.item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n10\tHeat\t1995\tAction\n11\tAlien\t1979\tX\n",
            }
            for file in files:
                (folder / file).write_text(contents[file])

        def read(folder):
            from malleable.datamodules.sources.recommendation.movielens import MovieLens

            return MovieLens(path=str(folder)).load()


movielens("100k", "u.data", "u.item")
movielens("1m", "ratings.dat", "movies.dat")
movielens("atomic", "a.inter", "a.item")


@reader("instruction rows", "train.json", "test.jsonl", "id2name.json", "name2genre.json", "genre_dict.json")
class _Instruction:
    def make(folder):
        rows = [{"instruction": "x", "input": '"Heat", "Alien"', "output": '"Brazil"'}] * 3
        (folder / "train.json").write_text(json.dumps(rows))
        (folder / "test.jsonl").write_text(lines(rows))
        (folder / "id2name.json").write_text(json.dumps({"0": "Heat", "1": "Alien", "2": "Brazil"}))
        (folder / "name2genre.json").write_text(json.dumps({"Heat": ["Crime"], "Alien": []}))
        (folder / "genre_dict.json").write_text(json.dumps(["Crime"]))

    def read(folder):
        from malleable.datamodules.sources.recommendation.instruction import InstructionRows

        return InstructionRows(str(folder)).load()


@reader("candidate rows", "train.jsonl", "val.json", "id2name.txt")
class _Candidates:
    def make(folder):
        rows = [{"historyList": ["Heat", "Alien"], "itemList": ["Brazil", "Dune"], "trueSelection": "Dune"}, {"history": [0, 1], "next": 2}]
        (folder / "train.jsonl").write_text(lines(rows))
        (folder / "val.json").write_text(json.dumps(rows))
        (folder / "id2name.txt").write_text("0::Heat\n1::Alien\n2::Brazil\n3::Dune\n")

    def read(folder):
        from malleable.datamodules.sources.recommendation.candidates import CandidateRows

        return CandidateRows(str(folder)).load()


def histories(name: str, text: str) -> None:
    @reader(f"histories {name}", f"h.{name}")
    class _:
        def make(folder):
            (folder / f"h.{name}").write_text(text)

        def read(folder):
            from malleable.datamodules.recommendation.histories import ItemLookup, read_histories

            return read_histories(folder / f"h.{name}", ItemLookup(["Heat (1995)", "Alien (1979)", "Dune"], [["1"], ["2"], ["3"]]))


histories("csv", "user_id,item_id\nu1,1,2\nu2,3\n")
histories("jsonl", lines([[1, 2], {"user_id": "u", "history": ["Heat", {"id": 3}]}]))
histories("json", json.dumps([[1, 2], {"user_id": "u", "history": ["Heat", {"title": "Dune"}]}]))

# --- graphs ---

TRIPLES = [("a b", "r", "c"), ("c", "s", "d"), ("d", "r", "a b"), ("c", "r", "c")] * 2
GRAPH = KnowledgeGraph(("a b", "c", "d"), ("r", "s"), (1, 1, 1), (1, 1))


def triples(name: str, file: str, **options: Any) -> None:
    @reader(f"triples {name}", file)
    class _:
        def make(folder):
            if file.endswith(".parquet"):
                pq.write_table(pa.table(dict(zip(("head", "relation", "tail"), zip(*TRIPLES, strict=True), strict=True))), folder / file)
                return
            between = "," if ".csv" in file else "\t"
            data = "".join(between.join(row) + "\n" for row in TRIPLES).encode()
            (folder / file).write_bytes(gzip.compress(data) if file.endswith(".gz") else data)

        def read(folder):
            from malleable.datamodules.sources.graphs.triples import Triples

            return Triples(str(folder / file), **options).load()


for ending in ("txt", "csv", "parquet", "txt.gz"):
    triples(ending, f"train.{ending}")


@reader("triples of ids", "train2id.txt", "entity2id.txt", "relation2id.txt")
class _Ids:
    def make(folder):
        (folder / "train2id.txt").write_text("3\n0 1 0\n1 2 1\n2 0 0\n")
        (folder / "entity2id.txt").write_text("3\na\t0\nb\t1\nc\t2\n")
        (folder / "relation2id.txt").write_text("2\nr\t0\ns\t1\n")

    def read(folder):
        from malleable.datamodules.sources.graphs.triples import Triples

        return Triples(str(folder), format="openke").load()


def labels(name: str, file: str, text: str) -> None:
    @reader(f"{name} {file}", file)
    class _:
        def make(folder):
            (folder / file).write_text(text)

        def read(folder):
            from malleable.datamodules.graphs import labels as graph_labels

            return getattr(graph_labels, f"read_{name}")(folder / file, GRAPH)


labels("queries", "q.tsv", "head\trelation\ttail\na b\tr\t?\n?\ts\td\nc\t?\td\n")
labels("queries", "q.csv", "a b,r,?\n?,s,d\nc,?,d\n")
labels("types", "t.tsv", "a b\tx\nc\ty\nother\tz\n")
labels("types", "t.json", json.dumps({"a b": ["x", "y"], "c": "z"}))
labels("descriptions", "d.json", json.dumps({"a b": "a text", "other": "z"}))

# --- editing and texts ---

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


# --- weights, patches, checkpoints ---


@reader("patch", "patch/patch.json", "patch/deltas.safetensors")
class _Patch:
    def make(folder):
        from tiny_patch import DOWN, UP, llama, random_patch

        tensors = dict(llama().state_dict())
        random_patch(tensors, (DOWN, UP), requests=[{"prompt": "{} is", "subject": "A", "target": "B"}], settings={"x": [1]}).write(folder / "patch")

    def read(folder):
        from malleable.commands.patch_text import describe, listing
        from malleable.lightning_modules.patches.patch import Patch, read_patches

        patch = Patch.read(folder / "patch")
        return describe(patch, {}), listing(read_patches(folder)), patch.manifest()


@reader("weights folder", "m/model-00001-of-00002.safetensors", "m/model.safetensors.index.json", "m/config.json", "m/patches/stack.json",
        "m/patches/originals.safetensors")  # fmt: skip
class _Folder:
    def make(folder):
        from tiny_patch import apply, llama, random_patch

        from malleable.lightning_modules.patches.storage import open_container

        llama().save_pretrained(folder / "m", max_shard_size="8KB")
        found = sorted(path.name for path in (folder / "m").glob("model-*"))
        for path in found[:1]:
            # Whatever the number of shards.
            renamed = "model-00001-of-00002.safetensors"
            (folder / "m" / path).rename(folder / "m" / renamed)
            index = folder / "m" / "model.safetensors.index.json"
            index.write_text(index.read_text().replace(path, renamed))
        apply(folder / "m", random_patch(open_container(folder / "m").tensors))

    def read(folder):
        from malleable.lightning_modules.patches.storage import open_container

        container = open_container(folder / "m")
        return [tensor.sum() for tensor in container.tensors.values()], container.stack.revert(container.stack.ids, container.tensors)


@reader("checkpoint", "c.ckpt")
class _Checkpoint:
    def make(folder):
        from tiny_patch import apply, llama, random_patch, save_checkpoint

        from malleable.lightning_modules.patches.storage import open_container

        path = save_checkpoint(llama(), folder / "c.ckpt", hyper_parameters={"_class_path": "malleable.SFT", "x": 1}, epoch=1, callbacks={})
        apply(path, random_patch(open_container(path).tensors))

    def read(folder):
        from malleable.checkpoints import AtomicCheckpointIO, stored_model
        from malleable.lightning_modules.language.export import read_checkpoint
        from malleable.lightning_modules.patches.storage import open_container

        container = open_container(folder / "c.ckpt")
        stored_model(str(folder / "c.ckpt"))
        AtomicCheckpointIO().load_checkpoint(folder / "c.ckpt")
        read_checkpoint(folder / "c.ckpt")
        return [tensor.sum() for tensor in container.tensors.values()], container.stack.ids


@reader("module checkpoint", "c.ckpt", slow=2)
class _Module:
    def make(folder):
        from malleable import ComplEx

        module = ComplEx(dimension=4, graph=GRAPH)
        module.configure_model()
        checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams), "pytorch-lightning_version": "2.6.0"}
        module.on_save_checkpoint(checkpoint)
        torch.save(checkpoint, folder / "c.ckpt")

    def read(folder):
        from malleable import ComplEx

        return ComplEx.load_from_checkpoint(folder / "c.ckpt").state_dict()


@reader("stored data", "c.ckpt", "model/malleable.json")
class _Stored:
    def make(folder):
        from tiny import tiny_catalog

        from malleable.datamodules.stored_identity import store_identity, write_folder

        checkpoint: dict[str, Any] = {"state_dict": {}}
        store_identity(checkpoint, "catalog", tiny_catalog())
        torch.save(checkpoint, folder / "c.ckpt")
        (folder / "model").mkdir()
        write_folder(folder / "model", "catalog", tiny_catalog(), {"x": 1})

    def read(folder):
        from tiny import tiny_catalog

        from malleable.datamodules.compatibility import check_exported_folder, check_identity
        from malleable.datamodules.stored_identity import read_stored, stores_data

        found = []
        for name in ("c.ckpt", "model"):
            stores_data(str(folder / name))
            stored = read_stored(str(folder / name))
            assert isinstance(stored, Catalog)
            found.append(len(stored))
            check_identity("catalog", stored, tiny_catalog())
        check_exported_folder(str(folder / "model"), tiny_catalog())
        return found


@reader("configuration beside a checkpoint", "version_0/config_fit.yaml")
class _Beside:
    def make(folder):
        (folder / "version_0" / "checkpoints").mkdir(parents=True)
        torch.save({"state_dict": {}}, folder / "version_0" / "checkpoints" / "last.ckpt")
        (folder / "version_0" / "config_fit.yaml").write_text(RECIPE)

    def read(folder):
        from malleable.checkpoints import differences, stored_model
        from malleable.lightning_modules.stored_weights import foreign_classes

        stored = stored_model(str(folder / "version_0" / "checkpoints" / "last.ckpt"))
        return stored and (differences({}, stored), foreign_classes(stored["init_args"]))


@reader("adapter", "adapter/adapter_config.json", "adapter/adapter_model.safetensors", slow=4)
class _Adapter:
    def make(folder):
        from tiny import tiny_catalog, tiny_config
        from tiny_module import save_base

        from malleable.lightning_modules.language.config import LanguageModelConfig, LoRA, build_language_model
        from malleable.lightning_modules.language.export import save_language_model

        save_base(folder / "base")
        tuned = build_language_model(LanguageModelConfig(name=str(folder / "base"), lora=LoRA(r=2)), tiny_catalog().vocabulary)
        save_language_model(tuned, folder / "adapter")
        del tiny_config

    def read(folder):
        from tiny import tiny_catalog

        from malleable.lightning_modules.language.config import LanguageModelConfig, build_language_model

        return build_language_model(LanguageModelConfig(name=str(folder / "base"), adapter=str(folder / "adapter")), tiny_catalog().vocabulary)


@reader("model", "base/config.json", "base/model.safetensors", "base/generation_config.json", slow=4)
class _Model:
    def make(folder):
        from tiny_module import save_base

        save_base(folder / "base")

    def read(folder):
        from tiny import tiny_catalog

        from malleable.lightning_modules.language.config import LanguageModelConfig, build_language_model

        return build_language_model(LanguageModelConfig(name=str(folder / "base")), tiny_catalog().vocabulary)


@reader("tokenizer", "t/tokenizer.json", "t/tokenizer_config.json", slow=4)
class _Tokenizer:
    def make(folder):
        from small_editing import tokenizer

        tokenizer().save_pretrained(folder / "t")

    def read(folder):
        from malleable.datamodules.language.tokenizer import load_tokenizer

        return load_tokenizer(str(folder / "t"))("A text.")


@reader("gguf", "g.gguf", slow=4)
class _GGUF:
    def make(folder):
        import gguf

        writer = gguf.GGUFWriter(str(folder / "g.gguf"), "llama")
        for name, number in (("context_length", 16), ("embedding_length", 8), ("block_count", 1), ("feed_forward_length", 8), ("head_count", 1)):
            getattr(writer, f"add_{name}")(number)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([b"a", b"b", b"ab", b"</s>"])
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(3)
        writer.add_bos_token_id(3)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def read(folder):
        import os

        from malleable.datamodules.language.tokenizer import load_tokenizer

        os.environ["MALLEABLE_CACHE"] = str(folder / "cache")
        return load_tokenizer(str(folder / "g.gguf"))("ab")


# --- state of runs ---


@reader("reference", "r.safetensors")
class _Reference:
    def make(folder):
        from malleable.lightning_modules.verified_file import save_verified

        save_verified({"row": torch.tensor([5, 3, 8]), "reference_logps": torch.zeros(3, 2)}, folder / "r.safetensors")

    def read(folder):
        from malleable.callbacks.reference import ReferenceCache

        return ReferenceCache._read(folder / "r.safetensors", torch.tensor([3, 8]))


@reader("second moments", "s.safetensors")
class _Statistics:
    def make(folder):
        from malleable.lightning_modules.editing.statistics import _write
        from malleable.lightning_modules.functional.editing.second_moments import SecondMoment

        _write(folder / "s.safetensors", "hash", {1: SecondMoment(3), 2: SecondMoment(3)}, 2)

    def read(folder):
        from malleable.lightning_modules.editing.statistics import _load
        from malleable.lightning_modules.functional.editing.second_moments import SecondMoment

        return _load(folder / "s.safetensors", "hash", {1: SecondMoment(3), 2: SecondMoment(3)})


@reader("round", "r.parquet")
class _Round:
    def make(folder):
        from malleable.callbacks.self_play.round_file import RoundFile

        RoundFile([0, 1], [5, 6], [[1], [2]], [[[3, 4]], [[5]]], [[0.5, 0.1], [0.2, 0.3]]).write(folder / "r.parquet")

    def read(folder):
        from malleable.callbacks.self_play.round_file import RoundFile

        return RoundFile.read(folder / "r.parquet").digest()


@reader("cache of tables", "t/manifest.json", "t/items/data-00000-of-00001.arrow", "t/items/state.json", "t/items/dataset_info.json")
class _TableCache:
    def make(folder):
        from malleable.datamodules.files.cache import write_tables

        write_tables(folder / "t", {"items": {"id": pa.array([1, 2, 3])}}, {"x": 1})

    def read(folder):
        from malleable.datamodules.files.cache import open_tables

        return open_tables(folder / "t")


@reader("cache of arrays", "a/manifest.json", "a/x.npy")
class _ArrayCache:
    def make(folder):
        import numpy as np

        from malleable.datamodules.files.cache import write_arrays

        write_arrays(folder / "a", {"x": np.arange(5)}, {"x": 1})

    def read(folder):
        from malleable.datamodules.files.cache import open_arrays

        return open_arrays(folder / "a")


RECIPE = """\
model:
  class_path: ComplEx
  init_args: {dimension: 8}
data:
  class_path: KnowledgeGraphDataModule
  init_args:
    source: {class_path: Nations}
trainer:
  max_epochs: 1
  callbacks:
  - class_path: RunReport
"""


@reader("recipe", "r.yaml", slow=2)
class _Recipe:
    def make(folder):
        (folder / "r.yaml").write_text(RECIPE)

    def read(folder):
        from malleable.argument_checks import check_arguments
        from malleable.layers import RecipeFile
        from malleable.option_errors import OptionParser

        check_arguments(["fit", "--config", str(folder / "r.yaml")])
        parser = OptionParser(prog="x")
        parser.add_argument("--config", action=RecipeFile)
        for key in ("model", "data", "trainer", "checkpoint"):
            parser.add_argument(f"--{key}", type=dict)
        return parser.parse_args(["--config", str(folder / "r.yaml")])


def copy(source: Path, target: Path) -> None:
    """Copy whole files, of which one is damaged then."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
