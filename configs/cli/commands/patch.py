"""``malleable patch``: show, apply, revert and export patches of stored weights, without a Trainer."""

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


def run(arguments: Sequence[str]) -> None:
    """Run a command of ``malleable patch``.

    Args:
        arguments: Arguments after ``malleable patch``: the name of the command and its options.
    """
    options = _parser().parse_args(list(arguments))
    text = options.run(options)
    text = for_terminal(text, keep="\n")
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")


def _list(options: argparse.Namespace) -> str:
    folder = options.target
    if folder.is_dir() and not is_weights_folder(folder) and any(is_patch(path) for path in folder.iterdir()):
        return listing(read_patches(folder))
    stack = _open(options).stack
    return listing(stack.patches) if stack.patches else f"{folder} contains no patches"


def _show(options: argparse.Namespace) -> str:
    if is_patch(options.target):
        patch, stack = Patch.read(options.target), PatchStack()
    else:
        stack = _open(options).stack
        patch = _select_patch(stack, options)
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
        raise ValueError(f"{options.first} and {options.second} are a patch and a target; give two patches or two targets")
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
        lines.append(f"{change.unchecked} of the {len(patch.base)} tensors of the patch's base are not in {options.target} and were not compared")
    description = f"{patch.id} ({patch.kind}, {_count(len(patch.deltas), 'tensor')})"
    if options.dry_run:
        return "\n".join([*lines, f"would apply {description} to {options.target}; nothing was written"])
    path = target.write(change, options.out)
    return "\n".join([*lines, f"applied {description}: {path} has {_count(len(change.stack.patches), 'patch')}"])


def _revert(options: argparse.Namespace) -> str:
    if options.all and options.ids:
        raise ValueError("--all reverts all patches; omit the ids")
    with _locked(options):
        return _revert_from(options, _open(options))


def _revert_from(options: argparse.Namespace, target: Container) -> str:
    latest = _latest(target.stack, options.target).id
    reverted = [target.stack.find(id).id for id in (target.stack.ids if options.all else options.ids or [latest])]
    change = target.stack.revert(reverted, target.tensors, force=options.force)
    path = target.write(change, options.out)
    return f"reverted {', '.join(reverted)}: {path} has {_count(len(change.stack.patches), 'patch')}"


def _export(options: argparse.Namespace) -> str:
    target = _open(options)
    if options.merged:
        if options.id:
            raise ValueError("--merged exports the weights with all patches; omit the id")
        path = target.write(Change(PatchStack(), {}), options.out)
        count = _count(len(target.stack.patches), "patch")
        return f"wrote {path} with {count} merged into the weights; it contains no original values, so the patches cannot be reverted there"
    patch = _select_patch(target.stack, options)
    return f"wrote patch {patch.id} to {patch.write(options.out)}"


def _locked(options: argparse.Namespace) -> AbstractContextManager[None]:
    """Prevent other commands from changing the target between reading and writing."""
    path = Path(os.path.realpath(options.target))
    recover(path)
    return locked(path) if path.exists() else nullcontext()


def _open(options: argparse.Namespace) -> Container:
    return open_container(options.target, options.prefix)


def _select_patch(stack: PatchStack, options: argparse.Namespace) -> Patch:
    return stack.find(options.id) if options.id else _latest(stack, options.target)


def _latest(stack: PatchStack, target: Path) -> Patch:
    if not stack.patches:
        raise ValueError(f"{target} contains no patches")
    return stack.patches[-1]


def _count(number: int, noun: str) -> str:
    ending = "" if number == 1 else "es" if noun.endswith("ch") else "s"
    return f"{number} {noun}{ending}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="malleable patch", description="Patches of stored weights, without a Trainer.", allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", metavar="<command>", required=True)
    stored = argparse.ArgumentParser(add_help=False)
    stored.add_argument("--prefix", default="model.", help="prefix of the model's parameters in a Lightning checkpoint (default: %(default)s)")
    changing = argparse.ArgumentParser(add_help=False)
    changing.add_argument("--out", type=Path, help="output path; the target is not changed (default: change the target)")

    command = commands.add_parser("list", parents=[stored], help="list the patches of a target, or of a folder of patches")
    command.add_argument("target", type=Path, help=f"{_TARGET}; or a folder that contains patches")
    command.set_defaults(run=_list)

    command = commands.add_parser("show", parents=[stored], help="show one patch: requests, settings, figures, tensors")
    command.add_argument("target", type=Path, help=f"a patch; or {_TARGET}")
    command.add_argument("id", nargs="?", help="id of a patch of the target, or its first characters (default: the latest patch)")
    command.add_argument("--json", action="store_true", help="print the manifest as JSON")
    command.set_defaults(run=_show)

    command = commands.add_parser("diff", parents=[stored], help="compare two targets, or two patches")
    command.add_argument("first", type=Path, help=f"a patch; or {_TARGET}")
    command.add_argument("second", type=Path, help="a second patch or target")
    command.set_defaults(run=_diff)

    command = commands.add_parser("apply", parents=[stored, changing], help="apply a patch to a target")
    command.add_argument("patch", type=Path, help="folder of the patch")
    command.add_argument("target", type=Path, help=_TARGET)
    command.add_argument("--allow_conflicts", action="store_true", help="apply also if other patches change the same tensors or requests")
    command.add_argument(
        "--force",
        action="store_true",
        help="apply also if tensors that the patch does not change differ from its base, or if patches that it requires are missing",
    )
    command.add_argument("--dry_run", action="store_true", help="check the patch without writing")
    command.set_defaults(run=_apply)

    command = commands.add_parser("revert", parents=[stored, changing], help="revert patches; the weights are restored bit by bit")
    command.add_argument("target", type=Path, help=_TARGET)
    command.add_argument("ids", nargs="*", metavar="id", help="ids of the patches, or their first characters (default: the latest patch)")
    command.add_argument("--all", action="store_true", help="revert all patches")
    command.add_argument("--force", action="store_true", help="revert also if other patches require them, or if the weights were trained later")
    command.set_defaults(run=_revert)

    command = commands.add_parser("export", parents=[stored], help="write a patch to a folder, or the weights with all patches merged")
    command.add_argument("target", type=Path, help=_TARGET)
    command.add_argument("out", type=Path, help="output path; must not exist")
    command.add_argument("id", nargs="?", help="id of the patch, or its first characters (default: the latest patch)")
    command.add_argument("--merged", action="store_true", help="write the patched weights without the patches; not revertible")
    command.set_defaults(run=_export)
    return parser
