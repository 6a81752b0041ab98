"""What is installed is what the repository says: packages, recipes, entry point, versions."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from shared import ROOT

import malleable

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
FOLDERS = ("lightning_modules", "datamodules", "callbacks", "configs")


def requirements(*extras):
    listed = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, listed)}


def pins():
    lines = (ROOT / "configs" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(name): Version(version) for name, _, version in (line.partition("==") for line in lines if line and line[0] != "#")}


def test_every_folder_with_code_is_a_listed_package():
    mapping = {folder: package for package, folder in SETUPTOOLS["package-dir"].items()}
    found = set()
    for folder in FOLDERS:
        for init in (ROOT / folder).rglob("__init__.py"):
            relative = init.parent.relative_to(ROOT).as_posix()
            home = max((known for known in mapping if relative == known or relative.startswith(f"{known}/")), key=len)
            found.add(mapping[home] + relative[len(home) :].replace("/", "."))
    assert found == set(SETUPTOOLS["packages"]), "[tool.setuptools] packages in pyproject.toml must list exactly the folders with an __init__.py"


def test_every_folder_with_code_has_an_init():
    missing = {path.parent for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    missing = sorted(str(folder) for folder in missing if not (folder / "__init__.py").exists())
    assert not missing, "editable installs do not import these folders"


def test_the_root_holds_what_it_should():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    pages = {"README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"}
    allowed = {"pyproject.toml", ".gitignore", ".pre-commit-config.yaml", ".ci", ".github", "tests", *pages, *FOLDERS}
    assert {name.partition("/")[0] for name in tracked} <= allowed


def test_the_entry_points_name_the_same_function():
    (script,) = metadata.entry_points(group="console_scripts", name="malleable")
    assert script.value == PROJECT["scripts"]["malleable"] == "malleable.main:main"
    assert "malleable.main import main" in (ROOT / "configs" / "cli" / "__main__.py").read_text(encoding="utf-8")


def test_versions_agree():
    assert malleable.__version__ == metadata.version("malleable") == PROJECT["version"]


def test_every_import_is_declared():
    modules = metadata.packages_distributions()
    declared = {*requirements("deepspeed", "images", "search"), "malleable", "bitsandbytes"}
    undeclared = set()
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            for top in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {""}:
                homes = {canonicalize_name(home) for home in modules.get(top, [top])}
                if isinstance(node, (ast.Import, ast.ImportFrom)) and not homes & declared:
                    undeclared.add(f"{path.relative_to(ROOT)}:{node.lineno}: {top}")
    assert not undeclared, "declare in pyproject.toml, with the reason for its lower bound:\n" + "\n".join(sorted(undeclared))


def test_every_bound_has_its_reason():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = text[text.index("dependencies = [") : text.index("[project.optional-dependencies]")]
    bare = [line for line in block.splitlines() if line.strip().startswith('"') and "#" not in line]
    assert not bare


def test_the_pins_satisfy_the_bounds():
    pinned = pins()
    for name, requirement in requirements("test", "deepspeed").items():
        if name != "malleable":
            assert name in pinned, f"configs/constraints.txt does not pin {name}"
            assert pinned[name] in requirement.specifier, f"{name}=={pinned[name]} against {requirement}"


def test_pins_are_exact_and_portable():
    pinned = pins()
    assert pinned["torch"] == Version("2.13.0")  # a newer one would bring gigabytes of CUDA packages along
    assert all(version.local is None for version in pinned.values())


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3", "2.8.0"])
def test_known_bad_versions_of_lightning_are_excluded(version):
    assert Version(version) not in requirements()["lightning"].specifier


def test_optional_packages_stay_optional():
    assert not {"deepspeed", "diffusers", "bm25s", "faiss-cpu", "pykeen", "trl"} & set(requirements())


@pytest.mark.slow
def test_the_wheel_holds_code_types_and_recipes(tmp_path):
    copy = tmp_path / "checkout"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(copy)], check=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(copy)]
    subprocess.run(pip, check=True, timeout=300)
    (wheel,) = tmp_path.glob("malleable-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files", *FOLDERS], cwd=copy, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        inside = name.replace("configs/cli/", "", 1) if name.startswith("configs/cli/") else name
        if not name.endswith((".txt", ".md")):
            assert f"malleable/{inside}" in names, f"{name} is missing from the wheel"
