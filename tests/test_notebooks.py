"""The written agreement between srgan_utils.py and the notebooks, and every notebook alone in an empty folder."""

import ast
import json
import re
import shutil
import subprocess
import time
from datetime import datetime
from pathlib import Path

import colab_standin
import nbformat
import pytest
from conftest import execute, fill_in

import srgan_utils

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = {node.name for node in ast.parse((ROOT / "srgan_utils.py").read_text()).body
          if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def json_cells(path: Path, kind: str = "code") -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def cells(path: Path, kind: str = "code") -> list[str]:
    return ["".join(cell["source"]) for cell in json_cells(path, kind)]


def address() -> str:
    """OWNER/NAME on GitHub, as the set-up cells have it: there is one."""
    (found,) = {re.search(r'(?m)^REPOSITORY = "(.+)"$', cells(path)[0]).group(1) for path in NOTEBOOKS}
    return found


@each_notebook
def test_notebook_opens_anywhere_without_what_somebody_left_in_it(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata and notebook.metadata.kernelspec.name == "python3"
    # 01 and 02 need no GPU: asking for one would spend a free user's quota before training begins
    assert ("accelerator" in notebook.metadata) == (path.stem in ("03_train", "04_compare"))
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    ids = [cell.get("id") for cell in json.loads(path.read_text())["cells"]]
    assert all(ids) and len(set(ids)) == len(ids)
    assert not re.search(r"/(?:work|home|root|tmp|Users|mnt)/|[A-Z]:\\\\|localhost", path.read_text())


@each_notebook
def test_code_fits_a_screen_reads_plainly_uses_public_names_and_shows_its_figures(path):
    """No class; one question at a time; and a Figure as a cell's last value would show nothing."""
    for number, cell in enumerate(json_cells(path)):
        most = 30 if cell["metadata"].get("cellView") == "form" else 15  # a form hides its code; the set-up cell is one for all
        assert len(cell["source"]) <= most or number == 0, f"{cell['id']}: {len(cell['source'])} lines"
        assert max(len(line.rstrip("\n")) for line in cell["source"]) <= 100
        tree = ast.parse("".join(cell["source"]))
        for node in ast.walk(tree):
            assert not isinstance(node, ast.ClassDef), f"class {node.name} belongs in the module"
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "srgan":
                assert node.attr in PUBLIC, f"srgan.{node.attr} is not public"
            if isinstance(node, ast.IfExp):
                assert not [inner for inner in ast.walk(node) if isinstance(inner, ast.IfExp) and inner is not node]
        if isinstance(tree.body[-1], ast.Expr):
            last = ast.unparse(tree.body[-1].value)
            assert not re.search(r"^(?:srgan\.\w+_figure\(|srgan\.show_images\(|figure$)| else None$", last), last


def test_the_four_notebooks_share_one_folded_set_up_cell_and_one_address():
    assert [path.stem for path in NOTEBOOKS] == ["01_data", "02_model", "03_train", "04_compare"]
    (first,) = {cells(path)[0] for path in NOTEBOOKS}
    assert "import srgan_utils as srgan" in first and len(first.splitlines()) <= 35
    readme = (ROOT / "README.md").read_text()
    for path in NOTEBOOKS:
        assert json_cells(path)[0]["metadata"] == {"cellView": "form"}
        badge = f"https://colab.research.google.com/github/{address()}/blob/main/notebooks/{path.name}"
        assert f'href="{badge}"' in cells(path, "markdown")[0] and badge in readme
    addresses = re.compile(r"github(?:\.com)?/([\w.-]+/srgan[\w.-]*)")
    files = [ROOT / "README.md", ROOT / "srgan_utils.py", *NOTEBOOKS]
    assert {found for file in files for found in addresses.findall(file.read_text())} == {address()}


def test_the_fork_command_in_the_readme_renames_everything(tmp_path):
    command = re.search(r"(?m)^\s*(perl -pi -e .+)$", (ROOT / "README.md").read_text()).group(1)
    for name in ("README.md", "srgan_utils.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    text = "".join(path.read_text() for path in tmp_path.rglob("*.*") if path.is_file())
    assert address() not in text and text.count('REPOSITORY = \\"YOU/YOUR-REPOSITORY\\"') == 4


def test_readme_has_at_most_1000_words_tables_and_code_not_counted():
    readme = re.sub(r"(?s)```.*?```", "", (ROOT / "README.md").read_text())
    assert len(" ".join(line for line in readme.splitlines() if not line.startswith("|")).split()) <= 1_000


@each_notebook
def test_texts_begin_with_what_one_gets_and_needs_number_their_sections_and_describe_their_pictures(path):
    badge, opening, *_ = texts = cells(path, "markdown")
    assert "alt=" in badge and re.match(r"# \d · ", opening)
    assert all(promise in opening for promise in ("**You will**", "**It takes**", "**It needs**"))
    lines = [line for text in texts for line in re.sub(r"(?s)```.*?```", "", text).splitlines()]
    assert sum(line.startswith("# ") for line in lines) == 1
    found = [line.split(" ")[1] for line in lines if line.startswith("## ")]
    assert found == [f"{int(path.stem[:2])}.{number}" for number in range(1, len(found) + 1)]
    for text in texts:
        assert all(re.search(r'alt="[^"]+"', tag) for tag in re.findall(r"<img [^>]*>", text))
        assert not re.search(r"!\[\s*\]\(", text)


# Of a figure and of loops: no one looks for these in another cell. And of 03's and 04's forms, which a cell below completes
PASSING = {"figure", "ax", "image", "images", "picture", "pictures", "title", "titles", "told", "name", "names", "each", "event",
           "network", "method", "sharp", "near", "variants", "minutes", "preset", "changes", "found"}


@each_notebook
def test_a_name_keeps_one_meaning(path):
    """No cell sets a variable that another one has set, the set-up's apart."""
    def assigned(node: ast.AST) -> set[str]:
        names = {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()
        own = (ast.FunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
        return names.union(*(assigned(child) for child in ast.iter_child_nodes(node) if not isinstance(child, own)))

    seen = set()
    for source in cells(path)[1:]:
        names = assigned(ast.parse(source)) - PASSING
        assert not names & seen
        seen |= names


def test_no_text_and_no_code_but_the_set_up_stands_in_two_notebooks():
    seen = set()
    for path in NOTEBOOKS:
        texts = {text for text in [*cells(path)[1:], *cells(path, "markdown")] if len(text.split()) > 6}
        assert not texts & seen
        seen |= texts


def test_03_asks_six_questions_before_it_trains_and_folds_the_others_away():
    notebook = json.loads((ROOT / "notebooks" / "03_train.ipynb").read_text())
    before, folded = {}, False
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if "srgan.watch(" in source:
            break
        if cell["cell_type"] == "markdown" and re.match("#+ ", source):  # a section ends where the next one begins
            folded = cell["metadata"].get("id") in notebook["metadata"]["colab"]["collapsed_sections"]
        before |= dict.fromkeys(re.findall(r"(?m)^(\w+) = .* #@param", source), folded)
    assert [name for name, hidden in before.items() if not hidden] == [
        "preset", "scale", "minutes", "source", "use_drive", "more_minutes"]
    assert any(before.values())


@each_notebook
def test_notebook_asks_colab_for_nothing_that_breaks_it(path):
    """No package replaced, no name that ipywidgets 7 lacks, no dialog outside the module and the set-up, which guard it."""
    set_up, *others = cells(path)
    text = "\n".join(others)
    assert not re.search(r"pip.*install.*(?: -U|--upgrade|==)", set_up + text)
    newer = r"TagsInput|ColorsInput|FloatsInput|IntsInput|DatetimePicker|\bStack\(|border_(?:top|right|bottom|left)|tooltip="
    assert not re.search(rf"{newer}|drive\.mount|files\.upload|google\.colab", text)


@each_notebook
def test_form_fields_parse_and_their_defaults_are_possible(path):
    kinds = {"raw": object, "string": str, "boolean": bool, "integer": int, "number": (int, float), "slider": (int, float)}
    for line in [line for source in cells(path) for line in source.splitlines() if "#@param" in line]:
        default, choices, about = re.fullmatch(r"\w+ = (.+?) +#@param ?(\[.*?\])? ?(\{.*\})?", line).groups()
        value = ast.literal_eval(default)
        about = json.loads(re.sub(r"([\w-]+):", r'"\1":', about or "{}"))
        assert choices or about, line
        assert not choices or value in ast.literal_eval(choices), line
        assert isinstance(value, kinds[about.get("type", "raw")]), line
        if about.get("type") == "slider":
            assert about["min"] <= value <= about["max"] and about["step"] > 0, line


def publish(folder: Path, branch: str = "main") -> None:
    """Commit all of `folder` on that branch: it is a repository whose own branch is main."""
    git = ["git", "-C", str(folder), "-c", "user.name=test", "-c", "user.email=test@localhost"]
    begin = f"checkout --quiet -b {branch}" if (folder / ".git").exists() else "init --quiet --initial-branch main"
    for command in (begin, "add --all", "commit --quiet --message published", "checkout --quiet main"):
        subprocess.run([*git, *command.split()], check=True)


def as_github(place: str, name: str = "") -> dict[str, str]:
    """The environment in which git finds `place` at GitHub's address."""
    return {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{place}.insteadOf",
            "GIT_CONFIG_VALUE_0": f"https://github.com/{name}"}


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> dict[str, str]:
    project = tmp_path_factory.mktemp("published") / "project"
    colab_standin.copy_project(ROOT, project)
    publish(project)
    return as_github(project, address())


@pytest.fixture
def alone(published, tmp_path, monkeypatch) -> Path:
    """An empty folder of somebody without a GPU, who finds the project on GitHub only."""
    for name, value in (published | {"TORCH_HOME": str(tmp_path / "torch")}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


@pytest.mark.notebooks
@each_notebook
def test_notebook_runs_alone_in_an_empty_folder_and_every_picture_has_words(path, alone):
    notebook, began = nbformat.read(path, as_version=4), time.time()
    execute(notebook, alone)
    pictured = next(cell for cell in notebook.cells if "data:image/png" in str(cell.get("outputs")))
    first = datetime.fromisoformat(pictured.metadata.execution["iopub.status.idle"]).timestamp()
    print(f"\n{path.name}: {time.time() - began:.0f} s, first picture after {first - began:.0f} s")
    assert (alone / "srgan-project" / "srgan_utils.py").is_file()
    pictures = [text for cell in notebook.cells for output in cell.get("outputs", [])
                for text in re.findall("<img [^>]{,999}", output.get("data", {}).get("text/html", ""))]
    assert pictures and all(re.match('<img alt="[^"]+"', text) for text in pictures)


@pytest.mark.notebooks
@pytest.mark.parametrize("stem, form", [("01_data", {}), ("03_train", {"minutes": 0.05})])
def test_notebook_of_two_photos_says_what_is_left_out(stem, form, alone, tmp_path):
    """Too few for a test face: it goes on to the end, with what can be done."""
    (tmp_path / "photos").mkdir()
    for number in range(2):
        srgan_utils.save_image(srgan_utils.synthetic_face(number), tmp_path / "photos" / f"IMG_{number}.png")
    notebook = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4)
    fill_in(notebook, source=str(tmp_path / "photos"), **form)
    printed = execute(notebook, alone)
    assert "photos: 2 train, 0 validation, 0 test faces" in printed
    assert stem != "03_train" or ("measure on training faces" in printed and "next: 04_compare.ipynb" in printed)
