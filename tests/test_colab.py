"""The project on Colab's machine, played by the stand-in of `colab_standin.py`: Drive and its failures, uploads, downloads,
and all four notebooks, 03 cut off in the middle and continued on a fresh machine from Drive."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import colab_standin
import IPython
import nbformat
import pytest
from colab_standin import MOUNT_FAILURES, Machine, MessageError
from conftest import TINY, fill_in

import srgan_utils

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def machine(tmp_path) -> Machine:
    (tmp_path / "content").mkdir()
    return Machine(tmp_path / "content", tmp_path / "cloud")


@pytest.fixture
def srgan(machine, tmp_path, monkeypatch):
    """srgan_utils.py as it is imported on that machine, from its current folder /content."""
    colab_standin.copy_project(machine, ROOT, tmp_path / "project")
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


# --- Drive


def test_drive_is_mounted_once_and_asks_once(srgan, machine, capsys):
    folder = srgan.mount_drive()
    assert folder == machine.content / "drive" / "MyDrive" / "srgan" and folder.is_dir()
    assert srgan.mount_drive() == folder and machine.consents == 1
    (folder / "kept").write_text("x")
    assert (machine.cloud / "srgan" / "kept").exists() and "WARNING" not in capsys.readouterr().out


def spoil(place: Path, how: str) -> None:
    if how == "symlink":
        (place.parents[1] / "elsewhere").mkdir()
        place.symlink_to(place.parents[1] / "elsewhere")
    elif how == "files":  # what makedirs under an unmounted mount point leaves behind
        (place / "MyDrive").mkdir(parents=True)
    else:
        place.write_text("")


@pytest.mark.parametrize("failure", [*MOUNT_FAILURES, "symlink", "files", "file"])
def test_every_failure_of_mount_is_one_loud_line_and_training_goes_on_here(failure, srgan, machine, store, capsys):
    point = machine.content / "drive"
    if failure in MOUNT_FAILURES:
        machine.failure = failure
    else:
        spoil(point, failure)
    before = sorted(machine.content.rglob("*"))
    drive = srgan.mount_drive()
    line, end, rest = capsys.readouterr().out.partition("\n")
    assert drive is None and line.startswith("WARNING: no Google Drive (") and "lost when the session ends" in line and not rest
    assert sorted(machine.content.rglob("*")) == before and not machine.cloud.exists()
    run = srgan.workspace() / "runs" / "tiny"
    *_, last = srgan.train(store, run, "sharp", TINY, backup=drive)
    assert last.done and (run / "generator.safetensors").exists()
    assert sorted(point.rglob("*") if point.exists() else []) == [each for each in before if point in each.parents]


def test_a_drive_that_is_not_mounted_is_no_place_for_a_backup(srgan, machine, store):
    with pytest.raises(OSError, match="is not mounted"):
        next(srgan.train(store, srgan.workspace() / "run", "sharp", TINY, backup=machine.content / "drive" / "MyDrive" / "srgan"))
    assert not (machine.content / "drive").exists()


def test_the_stand_in_checks_in_the_real_order(machine):
    """Consent comes before 'already mounted', which comes before what is wrong with the mount point."""
    mount = colab_standin.modules(machine)["google.colab.drive"].mount
    point = machine.content / "drive"
    mount(str(point))
    machine.failure = "consent denied"
    with pytest.raises(MessageError, match="credential propagation"):
        mount(str(point))
    machine.failure = ""
    mount(str(point))
    assert machine.consents == 3
    mount(str(point), force_remount=True)
    with pytest.raises(ValueError, match="space"):
        mount(f"{point} 2")
    with pytest.raises(ValueError, match="directory that exists"):
        mount(str(machine.content / "none" / "drive"))
    machine.failure = "not Colab's own machine"
    with pytest.raises(NotImplementedError):
        mount(f"{point} 2")


# --- Uploads and downloads


def test_what_is_chosen_lies_in_the_folder_once(srgan, machine):
    """Also where the current folder holds a file of that name already: Colab then calls the new one 'a (1).png'."""
    (machine.content / "a.png").write_bytes(b"older")
    machine.chosen = {"a.png": b"one", "b.jpg": b"two"}
    assert srgan.upload_images("photos") is None
    found = {path.read_bytes() for path in (machine.content / "photos").iterdir()}
    assert found == {b"one", b"two"} and (machine.content / "a.png").read_bytes() == b"older"
    assert sorted(path.name for path in machine.content.iterdir() if path.is_file()) == ["a.png"]


def test_a_dialog_that_is_cancelled_changes_nothing(srgan, machine):
    machine.chosen = ""
    srgan.upload_images("photos")
    assert list((machine.content / "photos").iterdir()) == []


def test_what_is_exported_is_downloaded_or_the_reason_is_said(srgan, machine, monkeypatch):
    import IPython.display

    run, shown = machine.content / "r", []
    run.mkdir()
    for name in ("generator.safetensors", "history.csv"):
        (run / name).write_text(name)
    monkeypatch.setattr(IPython.display, "display", lambda each, display_id=None: shown.append(each))
    srgan.export_button(run)
    button, said = shown[0].children
    machine.outputs_blocked = True
    button.click()
    assert said.value == "TypeError: Failed to fetch" and not machine.downloads
    machine.outputs_blocked = False
    button.click()
    assert said.value.startswith("r.zip, ") and machine.downloads == [str(run / "r.zip")]


# --- The four notebooks


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """A machine of Colab's, the project "on GitHub", and kernels that run there."""
    place = tmp_path_factory.mktemp("colab")
    machine = Machine(place / "content", place / "cloud")
    project = place / "project"
    colab_standin.copy_project(machine, ROOT, project)
    git = ["git", "-C", str(project), "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in ("init --quiet --initial-branch main", "add --all", "commit --quiet --message published"):
        subprocess.run([*git, *command.split()], check=True)
    settings = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{project}.insteadOf",
                "GIT_CONFIG_VALUE_0": f"https://github.com/{srgan_utils.REPOSITORY}", "TORCH_HOME": str(place / "torch")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (settings | colab_standin.start_in_kernels(machine, place / "ipython")).items():
            patch.setenv(name, value)
        patch.delenv("PYTHONPATH", raising=False)
        yield machine


def run_all(machine: Machine, stem: str, until: Callable[[], bool] | None = None, **form) -> str:
    """What the notebook prints on a fresh machine, with fields of its forms changed; cut off without warning `until` then."""
    from nbclient import NotebookClient
    from nbclient.exceptions import DeadKernelError

    shutil.rmtree(machine.content, ignore_errors=True)
    machine.content.mkdir()
    notebook = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4)
    fill_in(notebook, **form)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(machine.content)}})
    cut = threading.Event()

    def watch():
        while not cut.is_set() and not until():
            cut.wait(0.2)
        if not cut.is_set():
            os.kill(client.km.provisioner.pid, signal.SIGKILL)

    watcher = threading.Thread(target=watch) if until else None
    if watcher:
        watcher.start()
    with pytest.raises(DeadKernelError) if until else contextlib.nullcontext():
        try:
            client.execute()
        finally:
            cut.set()
            if watcher:
                watcher.join()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert until or any("image/png" in str(output) for output in outputs)
    return "".join(output.get("text", "") for output in outputs)


@pytest.fixture(scope="module")
def trained(colab) -> tuple[Path, int, str]:
    """03, cut off after a backup reached Drive, then run again on a fresh machine: its folder on Drive, the update at which
    it was cut, and what the second session printed."""
    runs = colab.cloud / "srgan" / "runs"

    def backed_up():
        return any(runs.glob("*/manifest.json"))

    run_all(colab, "03_train", until=backed_up, source="synthetic")
    (folder,) = runs.iterdir()
    kept = json.loads((folder / "manifest.json").read_text())["update"]
    return folder, kept, run_all(colab, "03_train", source="synthetic")


@pytest.mark.notebooks
def test_03_cut_off_continues_from_drive_on_a_fresh_machine(trained, colab):
    folder, kept, printed = trained
    assert f"continues at update {kept} of" in printed
    run = colab.content / "srgan-work" / "runs" / folder.name
    steps = [int(line.split(",")[0]) for line in (run / "history.csv").read_text().splitlines()[1:]]
    assert kept < steps[-1] and steps == list(range(1, steps[-1] + 1))
    assert json.loads((folder / "manifest.json").read_text())["update"] == steps[-1]
    for name in ("generator.safetensors", "history.csv", "config.json"):
        assert (folder / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.notebooks
def test_04_takes_the_network_that_03_left_on_drive(trained, colab):
    """By its path, as 03 says at its end: a run of `demo` does not take the place of the project's own by itself."""
    folder, _, printed = trained
    path = colab.content / "drive" / "MyDrive" / "srgan" / "runs" / folder.name / "generator.safetensors"
    assert f"tick use_drive there, and write {path} into its field weights" in printed
    assert f"{path}\ndemo at 4x" in run_all(colab, "04_compare", source="synthetic", use_drive=True, weights=str(path))


@pytest.mark.notebooks
@pytest.mark.parametrize("stem", ["01_data", "02_model", "04_compare"])
def test_notebook_runs_on_colab_without_a_click(stem, colab):
    printed = run_all(colab, stem)
    assert "Runtime > Change runtime type" in printed and not (colab.content / "drive").exists()
