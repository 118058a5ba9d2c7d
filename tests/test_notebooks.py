"""The written agreement between srgan_utils.py and the notebooks, and every notebook alone in an empty folder."""

import ast
import json
import os
import re
import shutil
import subprocess
import time
from datetime import datetime
from pathlib import Path

import nbformat
import pytest
from conftest import fill_in

import srgan_utils

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = {node.name for node in ast.parse((ROOT / "srgan_utils.py").read_text()).body
          if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str = "code") -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def test_there_are_four_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["01_data", "02_model", "03_train", "04_compare"]


@each_notebook
def test_notebook_is_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata
    assert notebook.metadata.kernelspec.name == "python3"
    # 01 and 02 need no GPU: asking for one would spend a free user's quota before training begins
    assert ("accelerator" in notebook.metadata) == (path.stem in ("03_train", "04_compare"))
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    ids = [cell.get("id") for cell in json.loads(path.read_text())["cells"]]
    assert all(ids) and len(set(ids)) == len(ids)


@each_notebook
def test_notebook_calls_public_names_and_defines_no_class(path):
    for source in cells(path):
        for node in ast.walk(ast.parse(source)):
            assert not isinstance(node, ast.ClassDef), f"class {node.name} belongs in the module"
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "srgan":
                assert node.attr in PUBLIC, f"srgan.{node.attr} is not public"


def test_all_notebooks_share_one_set_up_cell_before_anything_else():
    (first,) = {cells(path)[0] for path in NOTEBOOKS}
    assert "import srgan_utils as srgan" in first and len(first.splitlines()) <= 35
    for path in NOTEBOOKS:  # folded
        code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        assert code[0]["metadata"] == {"cellView": "form"}


def address() -> str:
    """OWNER/NAME on GitHub, as the set-up cells have it: there is one."""
    (found,) = {re.search(r'(?m)^REPOSITORY = "(.+)"$', cells(path)[0]).group(1) for path in NOTEBOOKS}
    return found


def test_badges_and_set_up_cells_agree_with_the_one_address():
    readme = (ROOT / "README.md").read_text()
    for path in NOTEBOOKS:
        badge = f"https://colab.research.google.com/github/{address()}/blob/main/notebooks/{path.name}"
        assert badge in cells(path, "markdown")[0] and badge in readme
    files = [ROOT / "README.md", ROOT / "srgan_utils.py", *NOTEBOOKS]
    addresses = re.compile(r"github(?:\.com)?/([\w.-]+/srgan[\w.-]*)")
    assert {found for file in files for found in addresses.findall(file.read_text())} == {address()}


def test_the_fork_command_in_the_readme_renames_everything(tmp_path):
    command = re.search(r"(?m)^\s*(perl -pi -e .+)$", (ROOT / "README.md").read_text()).group(1)
    for name in ("README.md", "srgan_utils.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    text = "".join(path.read_text() for path in tmp_path.rglob("*.*") if path.is_file())
    assert address() not in text and text.count('REPOSITORY = \\"YOU/YOUR-REPOSITORY\\"') == 4


# --- What every notebook keeps to, read from its source alone


@each_notebook
def test_notebook_begins_with_what_it_gives_how_long_it_takes_and_what_it_needs(path):
    badge, opening = cells(path, "markdown")[:2]
    assert re.search(rf'href="https://[^"]+/notebooks/{path.name}"', badge) and "alt=" in badge
    assert re.match(r"# \d · ", opening)
    for promise in ("**You will**", "**It takes**", "**It needs**"):
        assert promise in opening, promise


@each_notebook
def test_headings_are_numbered_in_order(path):
    lines = [line for text in cells(path, "markdown") for line in re.sub(r"(?s)```.*?```", "", text).splitlines()]
    assert sum(line.startswith("# ") for line in lines) == 1
    found = [line.split(" ")[1] for line in lines if line.startswith("## ")]
    assert found == [f"{int(path.stem[:2])}.{number}" for number in range(1, len(found) + 1)]


@each_notebook
def test_no_cell_is_longer_than_a_screen(path):
    """A form hides its code, and the set-up cell (see above) is one for all; the rest is there to be read."""
    for cell in [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"][1:]:
        most = 30 if cell["metadata"].get("cellView") == "form" else 15
        assert len(cell["source"]) <= most, f"{cell['id']}: {len(cell['source'])} lines"


@each_notebook
def test_code_has_at_most_100_columns(path):
    assert not [line for source in cells(path) for line in source.splitlines() if len(line) > 100]


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

    sets = [assigned(ast.parse(source)) - PASSING for source in cells(path)[1:]]
    assert not {name for number, names in enumerate(sets) for name in names if any(name in other for other in sets[:number])}


def test_03_asks_six_questions_before_it_trains_and_folds_the_others_away():
    notebook = json.loads((ROOT / "notebooks" / "03_train.ipynb").read_text())
    before, folded = {}, False
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if "srgan.watch(" in source:
            break
        if cell["cell_type"] == "markdown" and "\n## " in f"\n{source}":
            folded = False  # a section ends where the next one begins
        if cell["metadata"].get("id") in notebook["metadata"]["colab"]["collapsed_sections"]:
            assert re.match("#+ ", source)
            folded = True
        before |= dict.fromkeys(re.findall(r"(?m)^(\w+) = .* #@param", source), folded)
    assert [name for name, hidden in before.items() if not hidden] == [
        "preset", "scale", "minutes", "source", "use_drive", "more_minutes"]
    assert any(before.values())


def test_no_section_stands_in_two_notebooks():
    """The same words, or a cell of the same code, the set-up apart."""
    seen = [{text for text in [*cells(path)[1:], *cells(path, "markdown")] if len(text.split()) > 6} for path in NOTEBOOKS]
    assert not [text for number, texts in enumerate(seen) for text in texts if any(text in other for other in seen[:number])]


def test_readme_is_short():
    """At most 1,000 words, tables and code not counted."""
    readme = re.sub(r"(?s)```.*?```", "", (ROOT / "README.md").read_text())
    assert len(" ".join(line for line in readme.splitlines() if not line.startswith("|")).split()) <= 1_000



@each_notebook
def test_cells_read_plainly_and_show_their_figures(path):
    """One question at a time; and a Figure as a cell's last value would show nothing."""
    for source in cells(path):
        tree = ast.parse(source)
        asked = [node for node in ast.walk(tree) if isinstance(node, ast.IfExp)]
        assert not [inner for node in asked for inner in ast.walk(node) if isinstance(inner, ast.IfExp) and inner is not node]
        if isinstance(tree.body[-1], ast.Expr):
            last = ast.unparse(tree.body[-1].value)
            assert not re.search(r"^(?:srgan\.\w+_figure\(|srgan\.show_images\(|figure$)| else None$", last), last


@each_notebook
def test_notebook_asks_colab_for_nothing_that_breaks_it(path):
    """No package replaced, no name that ipywidgets 7 lacks, no dialog outside the module and the set-up, which guard it."""
    assert not re.search(r"pip.*install.*(?: -U|--upgrade|==)", cells(path)[0])
    text = "\n".join(cells(path)[1:])
    assert not re.search(r"pip.*install.*(?: -U|--upgrade|==)", text)
    newer = r"TagsInput|ColorsInput|FloatsInput|IntsInput|DatetimePicker|\bStack\(|border_(?:top|right|bottom|left)|tooltip="
    assert not re.search(newer, text)
    assert not re.search(r"drive\.mount|files\.upload|google\.colab", text)


@each_notebook
def test_form_fields_parse_and_their_defaults_are_possible(path):
    kinds = {"raw": object, "string": str, "boolean": bool, "integer": int, "number": (int, float), "slider": (int, float)}
    for source in cells(path):
        for line in filter(lambda line: "#@param" in line, source.splitlines()):
            default, choices, about = re.fullmatch(r"\w+ = (.+?) +#@param ?(\[.*?\])? ?(\{.*\})?", line).groups()
            value = ast.literal_eval(default)
            about = json.loads(re.sub(r"([\w-]+):", r'"\1":', about or "{}"))
            assert choices or about, line
            assert not choices or value in ast.literal_eval(choices), line
            assert isinstance(value, kinds[about.get("type", "raw")]), line
            if about.get("type") == "slider":
                assert about["min"] <= value <= about["max"] and about["step"] > 0, line


@each_notebook
def test_pictures_in_texts_have_alternative_text(path):
    for text in cells(path, "markdown"):
        assert all(re.search(r'alt="[^"]+"', tag) for tag in re.findall(r"<img [^>]*>", text))
        assert not re.search(r"!\[\s*\]\(", text)


@each_notebook
def test_notebook_names_no_place_on_somebodys_machine(path):
    assert not re.search(r"/(?:work|home|root|tmp|Users|mnt)/|[A-Z]:\\\\|localhost", path.read_text())


def publish(project: Path) -> dict[str, str]:
    """Make `project` a repository, and return the environment in which git takes it for the one on GitHub."""
    git = ["git", "-C", str(project), "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in ("init --quiet --initial-branch main", "add --all", "commit --quiet --message published"):
        subprocess.run([*git, *command.split()], check=True)
    return {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{project}.insteadOf",
            "GIT_CONFIG_VALUE_0": f"https://github.com/{address()}"}


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> dict[str, str]:
    clone = tmp_path_factory.mktemp("published") / "project"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".git", "srgan-work", "demo-out", "__pycache__", ".*cache"))
    return publish(clone)


@pytest.mark.notebooks
@each_notebook
def test_notebook_runs_alone_in_an_empty_folder(path, published, tmp_path, monkeypatch, record_property):
    """Run all as a newcomer without a GPU would, and end in a picture."""
    from nbclient import NotebookClient

    for name, value in (published | {"TORCH_HOME": str(tmp_path / "torch")}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    folder = tmp_path / "empty"
    folder.mkdir()
    notebook = nbformat.read(path, as_version=4)
    began = time.time()
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    pictured = next(cell for cell in notebook.cells if "data:image/png" in str(cell.get("outputs")))
    first = datetime.fromisoformat(pictured.metadata.execution["iopub.status.idle"]).timestamp()
    print(f"\n{path.name}: {time.time() - began:.0f} s, first picture after {first - began:.0f} s")
    assert (folder / "srgan-project" / "srgan_utils.py").is_file()
    pictures = [text for cell in notebook.cells for output in cell.get("outputs", [])
                for text in re.findall("<img [^>]{,999}", output.get("data", {}).get("text/html", ""))]
    assert pictures and all(re.match('<img alt="[^"]+"', text) for text in pictures)
    if keep := os.environ.get("SRGAN_KEEP_NOTEBOOKS"):  # to look at them afterwards
        nbformat.write(notebook, Path(keep) / path.name)


@pytest.mark.notebooks
@pytest.mark.parametrize("stem, form", [("01_data", {}), ("03_train", {"minutes": 0.05})])
def test_notebook_of_two_photos_says_what_is_left_out(stem, form, published, tmp_path, monkeypatch):
    """Too few for a test face: it goes on to the end, with what can be done."""
    from nbclient import NotebookClient

    for name, value in published.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / "photos").mkdir()
    for number in range(2):
        srgan_utils.save_image(srgan_utils.synthetic_face(number), tmp_path / "photos" / f"IMG_{number}.png")
    notebook = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4)
    fill_in(notebook, source=str(tmp_path / "photos"), **form)
    (tmp_path / "empty").mkdir()
    place = {"metadata": {"path": str(tmp_path / "empty")}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "photos: 2 train, 0 validation, 0 test faces" in printed
    assert stem != "03_train" or ("measure on training faces" in printed and "next: 04_compare.ipynb" in printed)
