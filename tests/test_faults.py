"""What goes wrong with disks and Drive, injected: nothing is accepted silently, nothing is lost beyond the last save."""

import errno
import os
import resource
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import TINY, final_state, refused
from test_checkpoints import slots

import srgan_utils as srgan

CHANGES = TINY | {"scale": 4, "pretrain_steps": 4, "steps": 6, "save_steps": 2, "sample_steps": 1}
pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture(scope="module")
def whole(store, small, tmp_path_factory):
    """All that the run leaves to which nothing happened."""
    trained(store, folder := tmp_path_factory.mktemp("whole") / "run")
    return final_state(folder)


def trained(store, folder, until=99, **options):
    """The last event of a run, which is left at update `until`."""
    for event in srgan.train(store, folder, "sharp", CHANGES, **options):
        if event.step >= until:
            break
    return event


@pytest.fixture
def drive(tmp_path, monkeypatch):
    """As real ones do, it fails in the middle of a checkpoint, once for each of `errors`; it can go away and come back."""
    drive, copyfile = SimpleNamespace(folder=tmp_path / "drive", errors=[], tries=0, failures=0), shutil.copyfile
    drive.folder.mkdir()

    def copy(source, target):
        if drive.folder in Path(target).parents:
            drive.tries += Path(target).suffix == ".pt"
            if Path(target).suffix == ".pt" and drive.errors:
                Path(target).write_bytes(Path(source).read_bytes()[:500])
                drive.failures += 1
                raise OSError(drive.errors[0], os.strerror(drive.errors.pop()))
            drive.failures += not drive.folder.exists()
        return copyfile(source, target)

    monkeypatch.setattr(shutil, "copyfile", copy)
    return drive


def wait(until):
    """For what the thread that copies does."""
    deadline = time.monotonic() + 20
    while not until() and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize("fault", [errno.EIO, errno.ENOSPC, errno.ENOTCONN, errno.EDQUOT, "the mount goes away"])
def test_drive_fails_and_comes_back(store, tmp_path, drive, whole, capsys, fault):
    """Training goes on, with one warning and no folder made in the mount's place; then the backup is whole again."""
    away = tmp_path / "away"
    for event in srgan.train(store, tmp_path / "r", "sharp", CHANGES, backup=drive.folder):
        if event.step == 3 and fault == "the mount goes away":
            drive.folder.rename(away)
        elif event.step == 3:
            drive.errors = [fault] * 99
        if event.step == 7:
            wait(lambda: drive.failures)
            drive.errors = []
            assert drive.folder.exists() != away.exists()
            if away.exists():
                away.rename(drive.folder)
    told = capsys.readouterr().err
    assert drive.failures and told.count("WARNING") == 1 and "goes on" in told
    assert event.step == 10 and final_state(tmp_path / "r") == whole
    assert srgan.newest_checkpoint(tmp_path / "none", drive.folder)["update"] == 10


def test_drive_goes_for_good(store, tmp_path, drive, whole, capsys):
    """The run ends as it would have; what the last good copy holds is said."""
    for event in srgan.train(store, tmp_path / "r", "sharp", CHANGES, backup=drive.folder):
        if event.step == 4:
            wait(lambda: slots(drive.folder))
            drive.folder.rename(tmp_path / "away")
        if event.step == 9:
            wait(lambda: drive.failures)
    assert not drive.folder.exists() and final_state(tmp_path / "r") == whole
    assert event.backup.startswith("update ") and event.backup.endswith(", copying fails")
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("WARNING") and f"update {max(slots(tmp_path / 'away').values())} at" in last


@pytest.mark.parametrize("failures", [2, 3, 4, 9])
def test_the_last_copy_is_tried_three_times_and_what_is_said_then_is_true(store, tmp_path, drive, capsys, failures):
    drive.errors = [errno.EIO] * failures
    trained(store, tmp_path / "r", backup=drive.folder, max_minutes=1e-9)  # saves once
    told = capsys.readouterr().err
    assert drive.tries in (3, 4) and told.count("tried again") == 1
    assert ("copying fails" in told) == (failures >= drive.tries)
    assert failures >= drive.tries or list(slots(drive.folder).values()) == [1]


def test_a_copy_under_way_is_not_queued_behind_and_training_waits_for_the_newest_at_its_end(store, tmp_path, monkeypatch, capsys):
    written, reached = [], []

    def slow(source, target):
        data = Path(source).read_bytes()
        if Path(target).suffix == ".pt":
            written.append(source.name)
            wait(lambda: len(reached) == 10)
        Path(target).write_bytes(data)

    monkeypatch.setattr(shutil, "copyfile", slow)
    for event in srgan.train(store, tmp_path / "r", "sharp", CHANGES, backup=tmp_path / "b"):
        reached.append(event.step)
    assert written == ["update-00000002.pt", "update-00000010.pt"] and 10 in slots(tmp_path / "b").values()
    assert "copying the newest checkpoint" in capsys.readouterr().err


def test_what_a_killed_process_saved_but_did_not_copy_is_copied(store, tmp_path):
    trained(store, tmp_path / "r")
    assert trained(store, tmp_path / "r", backup=tmp_path / "b").notes == ["continues at update 10 of 10"]
    assert list(slots(tmp_path / "b").values()) == [10]


@pytest.mark.parametrize("place", ["/content/drive/MyDrive/r", "/content/../content/drive/r", "/content/drive"])
def test_nothing_is_made_where_drive_is_not_mounted(store, tmp_path, monkeypatch, capsys, place):
    """Colab would keep it on its own disk and lose it."""
    monkeypatch.chdir(tmp_path)
    for command in (["prepare", "synthetic", "--store", place], ["prepare", place, "--store", "s"],
                    ["compare", "--store", str(store.folder), "--out", place]):
        assert srgan.main(command) == 2
        assert "is not mounted" in capsys.readouterr().err.splitlines()[-1]
    for folder, backup in ((place, None), (tmp_path / "r", place)):
        with refused(OSError, "is not mounted"):
            trained(store, folder, backup=backup)
    assert not Path("/content/drive").exists() and list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_stops_the_run_in_one_line_and_loses_nothing(store, tmp_path, whole):
    """By a limit on the size of files, which the checkpoint exceeds."""
    trained(store, tmp_path / "r", until=2)
    small = max(path.stat().st_size for path in (tmp_path / "r" / "ckpt").iterdir()) // 2
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for fails in (lambda: trained(store, tmp_path / "r"), lambda: srgan.prepare("synthetic", tmp_path / "s", limit=17)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (small, before[1]))
        try:
            with refused(OSError):
                fails()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert srgan.newest_checkpoint(tmp_path / "r" / "ckpt")["update"] >= 2
    trained(store, tmp_path / "r")
    assert final_state(tmp_path / "r") == whole
    assert len(srgan.prepare("synthetic", tmp_path / "s", limit=17)) == 20


def test_a_disk_without_room_for_the_checkpoints_is_refused_before_the_first_update(store, tmp_path, monkeypatch):
    usage = shutil.disk_usage
    trained(store, tmp_path / "other")
    size = max(path.stat().st_size for path in (tmp_path / "other" / "ckpt").iterdir())
    monkeypatch.setattr(srgan, "pretrain_step", None)
    for tight, free in (("r", 1000), ("b", 1000), ("r", 1.5 * size), ("b", 1.5 * size)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(
            free=free if Path(path).name == tight or not (tmp_path / tight).exists() else 10**12))
        with refused(OSError, "free and needs"):
            trained(store, tmp_path / "r", backup=tmp_path / "b")
        assert not (tmp_path / "r").exists()


def test_one_trains_a_run_at_a_time_and_the_second_says_so(store, tmp_path, whole, capsys):
    """An earlier cell's loop, say. It can go on, and when it is gone the next one can."""
    left = srgan.train(store, tmp_path / "r", "sharp", CHANGES)
    while next(left).step < 3:
        pass
    before = final_state(tmp_path / "r")
    with refused(BlockingIOError, "is in use by another process or an earlier cell: wait"):
        trained(store, tmp_path / "r")
    assert srgan.main(["train", "--store", str(store.folder), "--run", str(tmp_path / "r")]) == 2
    assert "is in use by another process" in capsys.readouterr().err.splitlines()[-1]
    assert final_state(tmp_path / "r") == before and next(left).step == 4
    left.close()
    assert trained(store, tmp_path / "r").step == 10 and final_state(tmp_path / "r") == whole


def test_what_was_refused_holds_nothing_and_leaves_nothing(store, tmp_path):
    """Though its traceback is kept. Nor does a folder that cannot be written."""
    for _ in range(2):
        with pytest.raises(ValueError) as kept:
            next(srgan.train(store, tmp_path / "r", "sharp", CHANGES | {"vgg": "none.pt", "content": "vgg"}))
        assert kept.tb and not (tmp_path / "r").exists()
    (tmp_path / "file").write_text("")  # root may write into folders that are only marked read-only
    for folder, backup in ((tmp_path / "file" / "r", None), (tmp_path / "r", tmp_path / "file" / "b")):
        with refused(OSError):
            trained(store, folder, backup=backup)
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and trained(store, tmp_path / "r").done
