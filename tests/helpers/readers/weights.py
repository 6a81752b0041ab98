"""Readers of weights, patches, item indices, checkpoints, models and tokenizers."""

from typing import Any

import torch

from malleable.datamodules.batch import Catalog
from readers.graphs import GRAPH
from readers.registry import reader


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


@reader("item index", "index/embeddings.safetensors", "index/items.json", "index/manifest.json")
class _ItemIndex:
    def make(folder):
        from malleable import ItemIndex

        ItemIndex(torch.randn(6, 4), [f"item {number}" for number in range(6)], titles=list("abcdef")).save(folder / "index")

    def read(folder):
        from malleable import ItemIndex

        index = ItemIndex.load(folder / "index")
        return index.search(index.embeddings[:2], 3), index.fingerprint


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


def write_gguf(path, **weights):
    """Write a GGUF file with a tokenizer, and with weights by name."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    numbers = {"context_length": 16, "embedding_length": 8, "block_count": 1, "feed_forward_length": 8, "head_count": 2, "head_count_kv": 2}
    for name, number in numbers.items():
        getattr(writer, f"add_{name}")(number)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([b"a", b"b", b"ab", b"</s>"])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(3)
    writer.add_bos_token_id(3)
    for name, value in weights.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@reader("gguf", "g.gguf", slow=4)
class _GGUF:
    def make(folder):
        write_gguf(folder / "g.gguf")

    def read(folder):
        import os

        from malleable.datamodules.language.tokenizer import load_tokenizer

        os.environ["MALLEABLE_CACHE"] = str(folder / "cache")
        return load_tokenizer(str(folder / "g.gguf"))("ab")


@reader("gguf model", "g.gguf", slow=4)
class _GGUFModel:
    def make(folder):
        square = torch.eye(8).numpy()
        names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        layer = {f"blk.0.{name}.weight": square for name in names} | {f"blk.0.{name}_norm.weight": square[0] for name in ("attn", "ffn")}
        ends = {"token_embd.weight": square[:4], "output.weight": square[:4], "output_norm.weight": square[0]}
        write_gguf(folder / "g.gguf", **layer, **ends)

    def read(folder):
        from malleable.datamodules.batch import Vocabulary
        from malleable.lightning_modules.language.config import LanguageModelConfig, build_language_model

        return build_language_model(LanguageModelConfig(name=str(folder / "g.gguf")), Vocabulary(4, 3, 3))
