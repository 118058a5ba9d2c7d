"""The project on Colab, played by `colab_standin.py`: set-up cell, Drive, uploads, downloads, notebooks (03 is cut off once)."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
from pathlib import Path

import colab_standin
import IPython
import nbformat
import pytest
from colab_standin import MOUNT_FAILURES, Machine, MessageError
from conftest import TINY, execute, fill_in
from nbclient.exceptions import DeadKernelError
from test_notebooks import NOTEBOOKS, address, as_github, cells, publish

import srgan_utils

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def machine(tmp_path) -> Machine:
    (tmp_path / "content").mkdir()
    return Machine(tmp_path / "content", tmp_path / "cloud")


@pytest.fixture
def srgan(machine, tmp_path, monkeypatch):
    """srgan_utils.py as it is imported on that machine, from its current folder /content."""
    colab_standin.copy_project(ROOT, tmp_path / "project", machine.content)
    for name, module in colab_standin.modules(machine).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(IPython, "get_ipython", colab_standin.shell_class(object))
    monkeypatch.setattr(os.path, "ismount", colab_standin.ismount(machine))
    monkeypatch.chdir(machine.content)
    spec = importlib.util.spec_from_file_location("srgan_on_colab", tmp_path / "project" / "srgan_utils.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert module.in_colab() and module.workspace() == machine.content / "srgan-work"
    return module


def test_drive_is_mounted_once_and_asks_once(srgan, machine, capsys):
    folder = srgan.mount_drive()
    assert folder == machine.content / "drive" / "MyDrive" / "srgan" and folder.is_dir()
    assert srgan.mount_drive() == folder and machine.consents == 1
    (folder / "kept").write_text("x")
    assert (machine.cloud / "srgan" / "kept").exists() and "WARNING" not in capsys.readouterr().out


SPOILED = {"symlink": lambda place: place.symlink_to(tempfile.mkdtemp()), "file": lambda place: place.write_text(""),
           "files": lambda place: (place / "MyDrive").mkdir(parents=True)}  # as makedirs below an unmounted mount point leaves


@pytest.mark.parametrize("failure", [*MOUNT_FAILURES, *SPOILED])
def test_every_failure_of_mount_is_one_loud_line_and_training_goes_on_here(failure, srgan, machine, store, capsys):
    point = machine.content / "drive"
    if failure in SPOILED:
        SPOILED[failure](point)
    machine.failure = failure
    before = sorted(machine.content.rglob("*"))
    drive = srgan.mount_drive()
    line, end, rest = capsys.readouterr().out.partition("\n")
    assert drive is None and line.startswith("WARNING: no Google Drive (") and "lost when the session ends" in line and not rest
    assert sorted(machine.content.rglob("*")) == before and not machine.cloud.exists()
    run = srgan.workspace() / "runs" / "tiny"
    *_, last = srgan.train(store, run, "sharp", TINY | {"pretrain_steps": 1, "steps": 1}, backup=drive)
    assert last.done and not last.stopped and (run / "generator.safetensors").exists()
    assert sorted(point.rglob("*") if point.exists() else []) == [each for each in before if point in each.parents]


def test_what_is_chosen_lies_in_the_folder_once_and_cancelling_changes_nothing(srgan, machine):
    """Also where the current folder holds a file of that name already: Colab then calls the new one 'a (1).png'."""
    (machine.content / "a.png").write_bytes(b"older")
    for machine.chosen in ({"a.png": b"one", "b.jpg": b"two"}, ""):
        assert srgan.upload_images("photos") is None
        found = {path.read_bytes() for path in (machine.content / "photos").iterdir()}
        assert found == {b"one", b"two"} and (machine.content / "a.png").read_bytes() == b"older"
        assert sorted(path.name for path in machine.content.iterdir() if path.is_file()) == ["a.png"]


def test_the_zip_is_downloaded_and_kept_where_the_browser_refuses_it(srgan, machine, tiny_run):
    shutil.copytree(tiny_run, machine.content / "r")
    assert machine.downloads == [str(srgan.export_zip("r"))] == [str(machine.content / "r.zip")]
    (machine.content / "r.zip").unlink()
    machine.outputs_blocked = True
    with pytest.raises(MessageError, match="Failed to fetch"):
        srgan.export_zip("r")
    assert (machine.content / "r.zip").exists()


SET_UP = cells(NOTEBOOKS[0])[0]
RUN_IT = """
import builtins, sys
from pathlib import Path
sys.path.insert(0, TESTS)
import colab_standin
del sys.path[0]
machine = colab_standin.Machine(Path(), Path("cloud"), chosen=CHOSEN)
if CHOSEN is not None:
    sys.modules.update(colab_standin.modules(machine))
builtins.get_ipython = object if CHOSEN is None else colab_standin.shell_class(object)
exec(CELL)
"""


def opened_from(place: str) -> str:
    """What Colab says of a notebook that was opened from `place`, beside another one."""
    return json.dumps([{"path": "fileId=" + urllib.parse.quote(place, safe="")}, {"path": "fileId=1aB"}])


class Newcomer:
    """Somebody on a fresh machine with nothing but one notebook, and what GitHub has for them."""

    def __init__(self, place: Path):
        self.here, self.github, self.stubs = place / "parent" / "here", place / "github", place / "stubs"
        for folder in (self.here, self.stubs / "torchmetrics", self.stubs / "pip"):
            folder.mkdir(parents=True)
        (self.stubs / "torchmetrics" / "__init__.py").write_text('raise SystemExit("imported before it is needed")')
        (self.stubs / "pip" / "__init__.py").touch()  # or the environment's own pip, if it has one, comes first
        (self.stubs / "pip" / "__main__.py").write_text("import sys; print('pip', sys.argv[1:])")
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(place), "PYTHONPATH": str(self.stubs)}
        self.environment |= as_github(f"{self.github}/")

    def publish(self, name: str, branch: str = "main") -> None:
        """The project as a repository on GitHub, which says who it is when it is imported."""
        folder = self.github / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "requirements.txt").write_text("torchmetrics>=1")
        (folder / "srgan_utils.py").write_text(f"print('imported {name} {branch}')")
        publish(folder, branch)

    def replace_git(self, script: str) -> None:
        """Another program in the place of git; an empty script: there is none."""
        folder = self.here.parent.parent / "bin"
        folder.mkdir()
        if script:
            (folder / "git").write_text(f"#!/bin/sh\n{script}\n")
            (folder / "git").chmod(0o755)
        self.environment["PATH"] = f"{folder}:/bin" if script else str(folder)

    def run(self, chosen: dict | str | None = None, environment: dict | None = None, cell: str = SET_UP) -> str:
        """What the cell prints, its error included. chosen: what is picked in Colab's dialog; None: not in Colab."""
        code = f"TESTS, CHOSEN, CELL = {str(Path(__file__).parent)!r}, {chosen!r}, {cell!r}\n{RUN_IT}"
        result = subprocess.run([sys.executable, "-S", "-c", code], cwd=self.here, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, env=self.environment | (environment or {}), timeout=60)
        return result.stdout


@pytest.fixture
def newcomer(tmp_path) -> Newcomer:
    return Newcomer(tmp_path)


@pytest.mark.parametrize("up", [False, True])
def test_a_copy_on_this_machine_comes_first_and_needs_no_network(up, newcomer):
    newcomer.replace_git("")
    (newcomer.here.parent if up else newcomer.here).joinpath("srgan_utils.py").write_text("print('imported mine')")
    assert newcomer.run() == "imported mine\nsrgan_utils.py is from the copy on this machine\n"


FORK = "https://github.com/somebody/fork/blob/topic/one/notebooks/01_data.ipynb"


@pytest.mark.parametrize("published, used", [
    ([("somebody/fork", "main"), ("somebody/fork", "topic/one")], "somebody/fork --branch topic/one"),
    ([("somebody/fork", "main")], "somebody/fork"),  # the branch is gone, or it is a commit
    ([], "OWNER"),                                   # the fork is gone, or private
])
def test_in_colab_the_notebooks_own_repository_and_branch_come_next(published, used, newcomer):
    for name, branch in [(address(), "main"), *published]:
        newcomer.publish(name, branch)
    with colab_standin.sessions(opened_from(FORK)) as environment:
        printed = newcomer.run("", environment)
        assert newcomer.run("", environment).endswith("srgan_utils.py is from the copy on this machine\n")
    used = used.replace("OWNER", address())
    name, _, branch = used.partition(" --branch ")
    assert printed == f"imported {name} {branch or 'main'}\nsrgan_utils.py is from https://github.com/{used}\n"


ODD = ("{}", "[]", "<html>", '[{"name": "01_data.ipynb"}]', opened_from("1aBcD"), opened_from("https://gist.github.com/a/123"))
UNTOLD = {answer: colab_standin.sessions(answer) for answer in ODD} | {
    "an error": colab_standin.sessions(opened_from(FORK), status=500), "not told where": contextlib.nullcontext({}),
    "no answer": colab_standin.sessions(opened_from(FORK), seconds=4),
    "nobody listens": contextlib.nullcontext({"COLAB_JUPYTER_IP": "127.0.0.1", "KMP_TARGET_PORT": "9"})}


@pytest.mark.parametrize("told", UNTOLD.values(), ids=UNTOLD)
def test_where_colab_does_not_say_it_the_address_in_the_cell_is_taken(told, newcomer):
    newcomer.publish(address())
    newcomer.publish("somebody/fork")
    with told as environment:
        printed = newcomer.run("", environment)
    assert printed == f"imported {address()} main\nsrgan_utils.py is from https://github.com/{address()}\n"


@pytest.mark.parametrize("script, why", [
    ("", ""), ('echo "asks: $GIT_TERMINAL_PROMPT" >&2; exit 1', "asks: 0"),  # for a password, which nobody could give
    ("sleep 30", ""), ("mkdir srgan-project; exit 1", "")], ids=["no git", "fails", "hangs", "half a clone"])
def test_in_colab_a_dialog_asks_for_the_module_where_nothing_can_be_fetched(script, why, newcomer):
    newcomer.replace_git(script)
    cell = SET_UP.replace("timeout=60", "timeout=1")
    assert cell != SET_UP
    printed = newcomer.run({"srgan_utils.py": b"print('imported mine')"}, cell=cell)
    assert f"could not be fetched ({why}" in printed and "Please choose its file srgan_utils.py:" in printed
    assert printed.endswith("imported mine\nsrgan_utils.py is from your upload: srgan_utils.py\n")


@pytest.mark.parametrize("chosen", ["", {"photo.jpg": b"x"}, None], ids=["cancelled", "another file", "not in Colab"])
def test_without_the_module_one_sentence_says_what_to_do(chosen, newcomer):
    printed = newcomer.run(chosen)
    assert re.search(r"RuntimeError: srgan_utils.py is missing \(.+\): upload it, then run this cell again\n", printed)
    assert "fatal: " in printed  # git's own reason
    assert ("Please choose" in printed) == (chosen is not None)


def test_what_is_missing_is_installed_before_anything_is_imported(newcomer):
    """All that the project lists; beside an uploaded module, which comes without a list, torchmetrics."""
    shutil.rmtree(newcomer.stubs / "torchmetrics")
    newcomer.publish(address())
    listed = newcomer.here / "srgan-project" / "requirements.txt"
    assert newcomer.run().startswith(f"pip ['install', '--quiet', '-r', '{listed}']\nimported {address()} main\n")
    (newcomer.here / "srgan_utils.py").write_text("print('imported mine')")
    assert newcomer.run().startswith("pip ['install', '--quiet', 'torchmetrics']\nimported mine\n")


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """A machine of Colab's, the project "on GitHub", and kernels that run there."""
    place = tmp_path_factory.mktemp("colab")
    machine = Machine(place / "content", place / "cloud")
    colab_standin.copy_project(ROOT, place / "project", machine.content)
    publish(place / "project")
    settings = as_github(place / "project", address()) | colab_standin.start_in_kernels(machine, place / "ipython")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (settings | {"TORCH_HOME": str(place / "torch")}).items():
            patch.setenv(name, value)
        patch.delenv("PYTHONPATH", raising=False)
        yield machine


def run_all(machine: Machine, stem: str, cut: bool = False, **form) -> str:
    """What the notebook prints on a fresh machine, with fields of its forms changed; cut: which goes once there is a backup."""
    shutil.rmtree(machine.content, ignore_errors=True)
    machine.content.mkdir()
    notebook = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4)
    fill_in(notebook, **form)
    for cell in notebook.cells:
        if cut and "srgan.watch(" in cell.source:
            cell.source += "\n    import os\n    event.backup.startswith('update') and os.kill(os.getpid(), 9)"
    printed = ""
    with pytest.raises(DeadKernelError) if cut else contextlib.nullcontext():
        printed = execute(notebook, machine.content)
    assert any("data:image/png" in str(cell.get("outputs")) for cell in notebook.cells)
    return printed


@pytest.fixture(scope="module")
def trained(colab) -> tuple[Path, int, str]:
    """03, cut off and run again on a fresh machine: its folder on Drive, the update of the cut, what the second session said."""
    run_all(colab, "03_train", cut=True, source="synthetic")
    (folder,) = (colab.cloud / "srgan" / "runs").iterdir()
    kept = srgan_utils.newest_checkpoint(folder / "none", folder)["update"]
    return folder, kept, run_all(colab, "03_train", source="synthetic")


@pytest.mark.notebooks
def test_03_cut_off_continues_from_drive_on_a_fresh_machine(trained, colab):
    folder, kept, printed = trained
    assert f"continues at update {kept:,}; " in printed and "Runtime > Change runtime type > T4 GPU" in printed
    run = colab.content / "srgan-work" / "runs" / folder.name
    steps = [int(line.split(",")[0]) for line in (run / "history.csv").read_text().splitlines()[1:]]
    newest = srgan_utils.newest_checkpoint(run / "none", folder)["update"]
    assert 0 < kept < steps[-1] == newest and steps == list(range(1, steps[-1] + 1))
    for name in ("generator.safetensors", "history.csv", "config.json"):
        assert (folder / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.notebooks
def test_04_takes_the_network_that_03_left_on_drive(trained, colab):
    """By its path, as 03 says at its end: a run of `demo` does not take the place of the project's own by itself."""
    folder, _, printed = trained
    path = colab.content / "drive" / "MyDrive" / "srgan" / "runs" / folder.name / "generator.safetensors"
    assert "there, tick use_drive" in printed and f"write {path} into its field weights" in printed
    assert f"{path}\ndemo at 4x" in run_all(colab, "04_compare", source="synthetic", use_drive=True, weights=str(path))


@pytest.mark.notebooks
@pytest.mark.parametrize("stem", ["01_data", "02_model", "04_compare"])
def test_notebook_runs_on_colab_without_a_click(stem, colab):
    printed = run_all(colab, stem)
    assert f"srgan_utils.py is from https://github.com/{address()}\n" in printed and not (colab.content / "drive").exists()
