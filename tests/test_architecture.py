"""Who may import whom, and how large files and folders may be. A wrong import is reported with file, line and the rule that it breaks."""

import ast
import sys
from collections import Counter

import pytest
from shared import ROOT

FOLDERS = ("lightning_modules", "datamodules", "callbacks", "configs")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

MAX_LINES = 400
MAX_FILES = 15
MAX_ARGUMENTS = 14
# Helpers and benchmarks are lists of independent programs.
SIZED = [*SOURCES, *sorted(path for path in (ROOT / "tests").rglob("*.py") if path.relative_to(ROOT).parts[1] not in ("helpers", "benchmarks"))]

# The types of data that others may use: batches, files, identities of catalogues, negative samplers, edit requests.
TYPES = tuple(
    f"malleable.datamodules.{name}"
    for name in ("batch", "collate", "editing.requests", "files", "negative_samplers", "compatibility", "stored_identity")
)
# Callbacks also use the loader and the reader of texts.
DATA = (*TYPES, *(f"malleable.datamodules.{name}" for name in ("language.texts", "language.tokenizer", "global_batches", "loading", "sample_ids")))
# Longest folder first: what each may import of ours besides what lies in its own folder.
ALLOWED = {
    "lightning_modules/functional": (),
    "lightning_modules/losses": ("malleable.lightning_modules.functional", "malleable.lightning_modules.serialization"),
    "lightning_modules/metrics": ("malleable.lightning_modules.functional",),
    # Atomic replacement and checked reading, of the standard library and torch alone.
    "lightning_modules/patches": ("malleable.datamodules.files",),
    "lightning_modules": TYPES,
    "datamodules": (),
    "callbacks": ("malleable.lightning_modules", *DATA),
    "configs": ("malleable",),
}
# Cores stay usable without a Trainer: of others' packages they import these only.
CORES = {"lightning_modules/functional", "lightning_modules/losses", "lightning_modules/metrics", "lightning_modules/patches"}
CORE_PACKAGES = {"torch", "torchmetrics", "numpy", "safetensors", "typing_extensions"}


def room(path):
    relative = path.relative_to(ROOT).as_posix()
    return next(folder for folder in ALLOWED if relative.startswith(f"{folder}/"))


def imports(path):
    """Yield ``(line, module)`` of every import of a file; for ``from a import b``, also ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


def broken_rule(path, module):
    """Say which rule an import breaks, or nothing."""
    folder = room(path)
    top = module.partition(".")[0]
    if module.startswith("."):
        return "absolute imports only: malleable...."
    if module.startswith("malleable.configs.cli"):
        return "the front package is spelt `malleable`; this spelling makes a second copy of it"
    if top in FOLDERS:
        return f"spelt malleable.{module}; the bare folder makes second copies of classes"
    if top == "malleable":
        own = "malleable." + folder.replace("/", ".")
        reachable = [own, *ALLOWED[folder]]
        if not any(module == name or module.startswith(f"{name}.") for name in reachable):
            return f"{folder} may import of ours: {', '.join(reachable)}"
    return None


def foreign(path, module):
    """Say whether a core reaches for a package that it must do without."""
    top = module.partition(".")[0]
    return room(path) in CORES and top not in CORE_PACKAGES | {"malleable"} | sys.stdlib_module_names


def test_there_is_something_to_check():
    assert {room(path) for path in SOURCES} >= set(ALLOWED) - {"lightning_modules/losses"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_inwards(path):
    problems = [f"{path}:{line}: {module}: {rule}" for line, module in imports(path) if (rule := broken_rule(path, module))]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("path", [path for path in SOURCES if room(path) in CORES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_cores_need_torch_only(path):
    problems = [f"{path}:{line}: {module}" for line, module in imports(path) if foreign(path, module)]
    assert not problems, f"allowed: {sorted(CORE_PACKAGES)}\n" + "\n".join(problems)


@pytest.mark.parametrize(
    ("file", "module"),
    [
        ("datamodules/base.py", "malleable.lightning_modules.base"),
        ("lightning_modules/recommendation/sft.py", "malleable.datamodules.base"),
        ("lightning_modules/recommendation/sft.py", "malleable.callbacks"),
        ("lightning_modules/functional/language/trie.py", "malleable.lightning_modules.base"),
        ("callbacks/report/report.py", "malleable.datamodules.recommendation.datamodule"),
        ("callbacks/report/report.py", "lightning_modules.base"),
        ("callbacks/report/report.py", ".base"),
        ("configs/cli/main.py", "malleable.configs.cli.main"),
    ],
)
def test_the_rules_bite(file, module):
    assert broken_rule(ROOT / file, module)


def test_no_file_is_long():
    long = {path.relative_to(ROOT).as_posix(): lines for path in SIZED if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES}
    assert not long, f"split these files along their meaning; the limit is {MAX_LINES} lines"


def test_no_folder_is_full():
    files = Counter(path.parent.relative_to(ROOT).as_posix() for path in SIZED if path.name not in ("__init__.py", "conftest.py"))
    full = {folder: count for folder, count in files.items() if count > MAX_FILES}
    assert not full, f"split these folders along their meaning; the limit is {MAX_FILES} files"


def test_constructors_have_few_arguments():
    # The arguments of loaders, optimizers and schedulers are the same in all classes.
    common = {"self", "batch_size", "global_batch_size", "eval_batch_size", "num_workers", "seed", "optimizer", "lr_scheduler"}
    long = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                own = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs) if argument.arg not in common]
                if len(own) > MAX_ARGUMENTS:
                    long[f"{path.relative_to(ROOT).as_posix()}:{node.lineno}"] = len(own)
    assert not long, f"group these arguments in a settings class; the limit is {MAX_ARGUMENTS} arguments besides {sorted(common - {'self'})}"


PACKAGES = [path for path in SOURCES if path.name == "__init__.py" and "\nFiles:\n" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", PACKAGES, ids=lambda path: path.parent.relative_to(ROOT).as_posix())
def test_a_package_docstring_lists_its_files(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    listed = {line.strip().partition(": ")[0] for line in docstring.partition("Files:\n")[2].splitlines()}
    files = {file.name for file in path.parent.glob("*.py")} - {"__init__.py"}
    assert listed == files | {f"{init.parent.name}/" for init in path.parent.glob("*/__init__.py")}
