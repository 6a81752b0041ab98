"""``malleable patch``: look at the patches of stored weights, apply, revert and export them, without a Trainer."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from malleable.commands.patch_text import describe, difference, listing, patch_difference
from malleable.datamodules.files.atomic import locked, recover
from malleable.datamodules.files.escape import for_terminal
from malleable.lightning_modules.patches.delta import Delta
from malleable.lightning_modules.patches.patch import Patch, is_patch, read_patches
from malleable.lightning_modules.patches.stack import Change, PatchStack
from malleable.lightning_modules.patches.storage import Container, is_weights_folder, open_container

_TARGET = "a Lightning checkpoint (one file), or the folder of a PEFT adapter or a Hugging Face model"


def run(words: Sequence[str]) -> None:
    """Run one command.

    Args:
        words: The command's name after ``patch`` and its options.
    """
    options = _parser().parse_args(list(words))
    text = options.run(options)
    text = for_terminal(text, keep="\n")
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")


def _list(options: argparse.Namespace) -> str:
    folder = options.target
    if folder.is_dir() and not is_weights_folder(folder) and any(is_patch(path) for path in folder.iterdir()):
        return listing(read_patches(folder))
    stack = _open(options).stack
    return listing(stack.patches) if stack.patches else f"{folder} holds no patches"


def _show(options: argparse.Namespace) -> str:
    if is_patch(options.target):
        patch, stack = Patch.read(options.target), PatchStack()
    else:
        stack = _open(options).stack
        patch = _pick(stack, options)
    sizes = {name: Delta(original).norm for name, original in stack.originals.items() if name in patch.deltas}
    if not options.json:
        return describe(patch, sizes)
    fields = json.loads(patch.manifest())
    for name, size in sizes.items():
        fields["tensors"][name]["relative_norm"] = fields["tensors"][name]["norm"] / size if size else None
    return json.dumps(fields, indent=1, ensure_ascii=False)


def _diff(options: argparse.Namespace) -> str:
    patches = [is_patch(path) for path in (options.first, options.second)]
    if any(patches) and not all(patches):
        raise ValueError(f"{options.first} and {options.second} are a patch and a target; give two of a kind")
    if all(patches):
        return patch_difference(Patch.read(options.first), Patch.read(options.second))
    return difference(open_container(options.first, options.prefix), open_container(options.second, options.prefix))


def _apply(options: argparse.Namespace) -> str:
    patch = Patch.read(options.patch)
    with _locked(options):
        return _apply_to(options, patch, _open(options))


def _apply_to(options: argparse.Namespace, patch: Patch, target: Container) -> str:
    change = target.stack.apply(patch, target.tensors, allow_conflicts=options.allow_conflicts, force=options.force)
    lines = [str(conflict) for conflict in change.conflicts]
    if change.unchecked:
        lines.append(f"{change.unchecked} of the {len(patch.base)} tensors it was made on are not in {options.target}, and were not compared")
    what = f"{patch.id} ({patch.kind}, {_count(len(patch.deltas), 'tensor')})"
    if options.dry_run:
        return "\n".join([*lines, f"would apply {what} to {options.target}; nothing was written"])
    where = target.write(change, options.out)
    return "\n".join([*lines, f"applied {what}: {where} has {_count(len(change.stack.patches), 'patch')}"])


def _revert(options: argparse.Namespace) -> str:
    if options.all and options.ids:
        raise ValueError("--all reverts every patch; give no ids with it")
    with _locked(options):
        return _revert_from(options, _open(options))


def _revert_from(options: argparse.Namespace, target: Container) -> str:
    latest = _latest(target.stack, options.target).id
    gone = [target.stack.find(id).id for id in (target.stack.ids if options.all else options.ids or [latest])]
    change = target.stack.revert(gone, target.tensors, force=options.force)
    where = target.write(change, options.out)
    return f"reverted {', '.join(gone)}: {where} has {_count(len(change.stack.patches), 'patch')}"


def _export(options: argparse.Namespace) -> str:
    target = _open(options)
    if options.merged:
        if options.id:
            raise ValueError("--merged folds in all patches of the target; give no id with it")
        where = target.write(Change(PatchStack(), {}), options.out)
        return f"wrote {where} with {_count(len(target.stack.patches), 'patch')} folded in: it keeps no originals, so they cannot be reverted there"
    patch = _pick(target.stack, options)
    return f"wrote patch {patch.id} to {patch.write(options.out)}"


def _locked(options: argparse.Namespace) -> AbstractContextManager[None]:
    """Keep other commands from changing the target between reading and writing it."""
    path = Path(os.path.realpath(options.target))
    recover(path)
    return locked(path) if path.exists() else nullcontext()


def _open(options: argparse.Namespace) -> Container:
    return open_container(options.target, options.prefix)


def _pick(stack: PatchStack, options: argparse.Namespace) -> Patch:
    return stack.find(options.id) if options.id else _latest(stack, options.target)


def _latest(stack: PatchStack, target: Path) -> Patch:
    if not stack.patches:
        raise ValueError(f"{target} holds no patches")
    return stack.patches[-1]


def _count(number: int, noun: str) -> str:
    ending = "" if number == 1 else "es" if noun.endswith("ch") else "s"
    return f"{number} {noun}{ending}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="malleable patch", description="Patches of stored weights, without a Trainer.", allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", metavar="<command>", required=True)
    stored = argparse.ArgumentParser(add_help=False)
    stored.add_argument("--prefix", default="model.", help="where the model lies in the module of a Lightning checkpoint (default: %(default)s)")
    changing = argparse.ArgumentParser(add_help=False)
    changing.add_argument("--out", type=Path, help="write there and leave the target alone (default: change the target)")

    command = commands.add_parser("list", parents=[stored], help="list the patches of a target, or of a folder of patches")
    command.add_argument("target", type=Path, help=f"{_TARGET}; or a folder with patches in it")
    command.set_defaults(run=_list)

    command = commands.add_parser("show", parents=[stored], help="show one patch: requests, settings, figures, tensors")
    command.add_argument("target", type=Path, help=f"a patch; or {_TARGET}")
    command.add_argument("id", nargs="?", help="which patch of the target, by the beginning of its id (default: the latest)")
    command.add_argument("--json", action="store_true", help="print the manifest as JSON")
    command.set_defaults(run=_show)

    command = commands.add_parser("diff", parents=[stored], help="compare two targets, or two patches")
    command.add_argument("first", type=Path, help=f"a patch; or {_TARGET}")
    command.add_argument("second", type=Path, help="another of its kind")
    command.set_defaults(run=_diff)

    command = commands.add_parser("apply", parents=[stored, changing], help="apply a patch to a target")
    command.add_argument("patch", type=Path, help="the folder of the patch")
    command.add_argument("target", type=Path, help=_TARGET)
    command.add_argument("--allow_conflicts", action="store_true", help="also over patches that touch the same tensors or requests")
    command.add_argument("--force", action="store_true", help="also if other tensors than the patched ones differ, or required patches are absent")
    command.add_argument("--dry_run", action="store_true", help="check everything, write nothing")
    command.set_defaults(run=_apply)

    command = commands.add_parser("revert", parents=[stored, changing], help="take patches away: the weights come back bit by bit")
    command.add_argument("target", type=Path, help=_TARGET)
    command.add_argument("ids", nargs="*", metavar="id", help="which, by the beginnings of their ids (default: the latest)")
    command.add_argument("--all", action="store_true", help="all of them")
    command.add_argument("--force", action="store_true", help="also if others were made on top, or the weights were trained since")
    command.set_defaults(run=_revert)

    command = commands.add_parser("export", parents=[stored], help="take a patch out as a folder, or write the target with all folded in")
    command.add_argument("target", type=Path, help=_TARGET)
    command.add_argument("out", type=Path, help="where to; must not exist")
    command.add_argument("id", nargs="?", help="which patch, by the beginning of its id (default: the latest)")
    command.add_argument("--merged", action="store_true", help="write the patched weights without the patches; not revertible")
    command.set_defaults(run=_export)
    return parser
