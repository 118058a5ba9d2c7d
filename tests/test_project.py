"""What the project promises about packages, files and its own two commands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]

# Colab's runtimes that a user can still select (googlecolab/backend-info), oldest first
RUNTIMES = {
    "2025.07": {"torch": "2.6.0", "torchvision": "0.21.0", "numpy": "2.0.2", "gdown": "5.2.0", "safetensors": "0.5.3",
                "tqdm": "4.67.1", "pillow": "11.2.1", "ipywidgets": "7.7.1", "matplotlib": "3.10.0"},
    "2026.01": {"torch": "2.9.0", "torchvision": "0.24.0", "numpy": "2.0.2", "gdown": "5.2.0", "safetensors": "0.7.0",
                "tqdm": "4.67.1", "pillow": "11.3.0", "ipywidgets": "7.7.1", "matplotlib": "3.10.0"},
}


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


def test_importing_the_module_loads_no_slow_package():
    """Only torch and numpy: the rest is imported where it is used."""
    code = ("import sys, torch, numpy; before = set(sys.modules); import srgan_utils; "
            "print([name for name in ('torchvision', 'matplotlib', 'ipywidgets', 'IPython', 'gdown', 'torchmetrics', 'PIL', "
            "'safetensors', 'tqdm') if name in set(sys.modules) - before])")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_readme_names_the_two_commands():
    readme = (ROOT / "README.md").read_text()
    assert re.search(r"(?m)^python -m pip install -r requirements.txt && python srgan_utils.py demo$", readme)
    assert re.search(r"(?m)^python -m pip install -r tests/requirements.txt && python -m pytest$", readme)


def test_readme_pictures_exist():
    for name in re.findall(r"!\[[^\]]*\]\((?!http)([^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / name).is_file(), name
