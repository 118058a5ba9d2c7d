"""What the project promises about its module's size and order, about packages, files and its own two commands."""

import ast
import dis
import re
import subprocess
import sys
from pathlib import Path
from types import CodeType

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
SOURCE = (ROOT / "srgan_utils.py").read_text(encoding="utf-8")
MODULE = ast.parse(SOURCE)

# Colab's runtimes that a user can still select (googlecolab/backend-info), oldest first; filelock of 2025.07: that July's newest
RUNTIMES = {
    "2025.07": {"torch": "2.6.0", "torchvision": "0.21.0", "numpy": "2.0.2", "gdown": "5.2.0", "safetensors": "0.5.3",
                "tqdm": "4.67.1", "pillow": "11.2.1", "ipywidgets": "7.7.1", "matplotlib": "3.10.0", "filelock": "3.18.0"},
    "2026.01": {"torch": "2.9.0", "torchvision": "0.24.0", "numpy": "2.0.2", "gdown": "5.2.1", "safetensors": "0.7.0",
                "tqdm": "4.67.1", "pillow": "11.3.0", "ipywidgets": "7.7.1", "matplotlib": "3.10.0", "filelock": "3.20.3"},
}


# --- The module can be read in an afternoon, from top to bottom (DESIGN, section 3)


def test_the_module_is_short_enough_to_read():
    lines = SOURCE.splitlines()
    assert len(lines) <= 3_135  # DESIGN asks for 2,600: not reached
    assert not [number for number, line in enumerate(lines, 1) if len(line) > 100]


def test_no_function_needs_more_than_one_screen():
    functions = [node for node in ast.walk(MODULE) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert not {each.name: each.lineno for each in functions if each.end_lineno - each.lineno + 1 > 45}


def test_there_are_few_public_names_each_defined_once():
    names = [node.name for node in MODULE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert len(names) == len(set(names))
    assert len([name for name in names if not name.startswith("_")]) <= 75


def test_sections_are_numbered_and_listed_at_the_top():
    banners = re.findall(r"(?m)^# -{90,}\n# (\d+)\. ([^:\n]+).*\n(?:# .+\n)*# -{90,}$", SOURCE)
    listed = re.findall(r"(?m)^ {4}([ \d]\d) (.+)$", ast.get_docstring(MODULE, clean=False))
    assert [int(number) for number, _ in banners] == [int(number) for number, _ in listed] == list(range(1, 17))
    assert all(about.startswith(name) for (_, name), (_, about) in zip(banners, listed))


def names_of(code: CodeType, operations: set[str], inside: bool) -> list[tuple[str, int]]:
    """(name, line) of all that `code` does by `operations`, in the functions and classes inside it, too."""
    found = [(each.argval, each.positions.lineno) for each in dis.get_instructions(code) if each.opname in operations]
    for constant in code.co_consts if inside else ():
        if isinstance(constant, CodeType):
            found += names_of(constant, operations, inside)
    return found


def test_everything_uses_only_what_stands_above_it():
    """Functions, classes and constants; in bodies, default arguments, decorators and annotations."""
    future, defined = "from __future__ import annotations", {}  # without which annotations are code
    code = compile(SOURCE.replace(future, "", 1), "srgan_utils.py", "exec", dont_inherit=True)
    for name, line in names_of(code, {"STORE_NAME"}, inside=False):
        defined.setdefault(name, line)
    assert future in SOURCE and defined["main"] > defined["train"] > defined["Generator"] > defined["Config"] > 30
    used = names_of(code, {"LOAD_NAME", "LOAD_GLOBAL", "LOAD_FROM_DICT_OR_GLOBALS"}, inside=True)
    assert len(used) > 1_000  # else this looks at nothing
    assert not {(name, line) for name, line in used if defined.get(name, 0) > line}
    assert not names_of(code, {"STORE_GLOBAL"}, inside=True)  # nothing global changes


def test_a_reader_meets_the_networks_early():
    assert SOURCE[:SOURCE.index("\nclass ResidualBlock(")].count("\n") + 2 < 550


def test_importing_the_module_loads_only_torch_and_numpy(tmp_path):
    code = (f"import sys, torch, numpy; before = set(sys.modules); sys.path.append({str(ROOT)!r}); import srgan_utils; "
            "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
            "print(sorted(new - set(sys.stdlib_module_names) - {'torch', 'numpy'}))")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (result.stdout.strip(), result.stderr) == ("['srgan_utils']", "") and not list(tmp_path.iterdir())


# --- Packages and README


def lines(path: str) -> list[str]:
    return [line for line in (ROOT / path).read_text().splitlines() if line and not line.startswith(("#", "-"))]


def colab() -> dict[str, str]:
    return dict(line.split("==") for line in lines("tests/colab.txt"))


@pytest.mark.parametrize("versions", [*RUNTIMES.values(), colab()], ids=[*RUNTIMES, "newest"])
def test_colab_meets_every_bound_already(versions):
    for requirement in map(Requirement, lines("requirements.txt")):
        if requirement.name != "torchmetrics":  # the one package that Colab lacks
            assert requirement.specifier.contains(Version(versions[requirement.name])), requirement


def test_bounds_are_lower_bounds_only():
    for requirement in map(Requirement, lines("requirements.txt")):
        assert [each.operator for each in requirement.specifier] == [">="]


def test_readme_names_the_two_commands():
    readme = (ROOT / "README.md").read_text()
    assert re.search(r"(?m)^python -m pip install -r requirements.txt && python srgan_utils.py demo$", readme)
    assert re.search(r"(?m)^python -m pip install -r tests/requirements.txt && python -m pytest$", readme)


def test_readme_pictures_exist():
    for name in re.findall(r"!\[[^\]]*\]\((?!http)([^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / name).is_file(), name
