"""Checkpoints, backups and exported generators: what is written comes back whole, or is refused by name."""

import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY

import srgan_utils as srgan

DRIVE = Path("/content/drive")


def state(update=7):
    weights = torch.randn(5, 3, generator=srgan.seeded(update))
    return {"update": update, "generator": {"w": weights, "n": torch.tensor(update)}, "history": "step\n1\n", "seconds": 1.5}


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def saved(folder, *updates, keep=9):
    for update in updates:
        srgan.save_checkpoint(folder, state(update), keep)
    return sorted(folder.glob("*.pt"))


def damage(path, at=100):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# --- One checkpoint


def test_round_trip(tmp_path):
    path = srgan.save_checkpoint(tmp_path / "new" / "ckpt", state())
    assert list((tmp_path / "new" / "ckpt").iterdir()) == [path]  # nothing else, no temporary file
    loaded = srgan.load_checkpoint(path)
    assert same({key: loaded[key] for key in state()}, state())
    plain = torch.load(path, weights_only=True)
    assert same(plain, loaded)


def test_any_damage_is_refused(tmp_path):
    path, = saved(tmp_path, 7)
    data, numbers = path.read_bytes(), random.Random(0)
    offsets = [0, 1, len(data) - 1, len(data) - 64, len(data) - 65, len(data) - 72, len(data) - 73]
    for at in offsets + [numbers.randrange(len(data)) for _ in range(200)]:
        flipped = bytearray(data)
        flipped[at] ^= 1 << numbers.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="update-00000007"):
            srgan.load_checkpoint(path)
    for length in (0, 1, 63, 64, 80, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="update-00000007"):
            srgan.load_checkpoint(path)
    path.write_bytes(data)
    assert srgan.load_checkpoint(path)["update"] == 7


def test_code_is_refused_and_not_run(tmp_path):
    """Even in a file whose checksum fits; an older checkpoint is found all the same."""
    target = tmp_path / "made"
    saved(tmp_path, 3)
    srgan.save_checkpoint(tmp_path, {"update": 5, "generator": Evil(target)})
    with pytest.raises(ValueError):
        srgan.load_checkpoint(tmp_path / "update-00000005.pt")
    assert srgan.newest_checkpoint(tmp_path)["update"] == 3
    assert not target.exists()


def test_a_newer_format_is_refused(tmp_path):
    path = srgan.save_checkpoint(tmp_path, state() | {"format": 99})
    with pytest.raises(ValueError, match="newer version"):
        srgan.load_checkpoint(path)


# --- Finding the newest


def test_two_are_kept(tmp_path):
    assert [path.name for path in saved(tmp_path, 1, 2, 30, 400, keep=2)] == ["update-00000030.pt", "update-00000400.pt"]
    assert srgan.newest_checkpoint(tmp_path)["update"] == 400


def test_nothing_to_find(tmp_path):
    assert srgan.newest_checkpoint(tmp_path) is None
    assert srgan.newest_checkpoint(tmp_path / "none", tmp_path / "no backup") is None


def test_a_damaged_newest_is_passed_over_by_name(tmp_path, capsys):
    paths = saved(tmp_path, 1, 2, 3)
    damage(paths[2])
    assert srgan.newest_checkpoint(tmp_path)["update"] == 2
    assert "update-00000003.pt" in capsys.readouterr().err
    damage(paths[1])
    assert srgan.newest_checkpoint(tmp_path)["update"] == 1
    damage(paths[0])
    with pytest.raises(ValueError, match=r"00003.*00002.*00001"):
        srgan.newest_checkpoint(tmp_path)


def test_saving_keeps_what_it_wrote(tmp_path):
    """Also beside damaged files of later updates, as after going back to an older backup."""
    for path in saved(tmp_path, 11, 12):
        damage(path)
    srgan.save_checkpoint(tmp_path, state(5), keep=2)
    assert srgan.newest_checkpoint(tmp_path)["update"] == 5


# --- Backup


def backed_up(folder, *updates, files=()):
    """One whole copy after the other, each by a thread of its own."""
    for update in updates:
        backup = srgan.Backup(folder)
        backup.submit(srgan.save_checkpoint(folder.parent / "local", state(update)), update, files)
        backup.close()
    return backup


def slots(folder):
    return {path.name: srgan.load_checkpoint(path)["update"] for path in sorted(folder.glob("slot_*.pt"))}


def test_backup_writes_two_slots_in_turn(tmp_path):
    """So that one is whole at any time; the manifest names the newest."""
    small = tmp_path / "history.csv"
    small.write_text("step\n1\n")
    seen = []
    for update in (1, 2, 3):
        backed_up(tmp_path / "b", update, files=[small, tmp_path / "not there"])
        manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
        assert manifest["update"] == update
        assert slots(tmp_path / "b")[manifest["slot"]] == update
        assert srgan.newest_checkpoint(tmp_path / "none", tmp_path / "b")["update"] == update
        seen.append(manifest["slot"])
    assert seen[0] == seen[2] != seen[1]
    assert slots(tmp_path / "b") == {seen[2]: 3, seen[1]: 2}
    assert (tmp_path / "b" / "history.csv").read_text() == small.read_text()


def test_the_manifest_comes_last(tmp_path, monkeypatch):
    """And a slot is read back first: a copy that lies is no backup."""
    order, copyfile, write_bytes, fits = [], shutil.copyfile, Path.write_bytes, srgan._seal_fits
    monkeypatch.setattr(shutil, "copyfile", lambda source, target: order.append(target.name) or copyfile(source, target))
    monkeypatch.setattr(Path, "write_bytes", lambda self, data: order.append(self.name) or write_bytes(self, data))
    monkeypatch.setattr(srgan, "_seal_fits", lambda path: order.append(f"read {path.name}") or fits(path))
    small = tmp_path / "config.json"
    write_bytes(small, b"{}")
    backed_up(tmp_path / "b", 1, files=[small])
    assert order == ["config.json", "slot_a.pt", "read slot_a.pt", "manifest.json"]

    def short(source, target):
        write_bytes(target, source.read_bytes()[:-1])

    monkeypatch.setattr(shutil, "copyfile", short)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    failing = backed_up(tmp_path / "b", 2)
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["update"] == 1
    assert failing.status.startswith("update 1, ") and "ago, failing since" in failing.status


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"slot": "other", "update": 3}'])
def test_a_broken_manifest_stops_no_backup(tmp_path, broken):
    """As a machine leaves it that dies while writing."""
    backed_up(tmp_path, 1, 2)
    (tmp_path / "manifest.json").write_text(broken)
    assert srgan.newest_checkpoint(tmp_path / "none", tmp_path)["update"] == 2
    backed_up(tmp_path, 3)
    assert json.loads((tmp_path / "manifest.json").read_text())["update"] == 3
    assert srgan.newest_checkpoint(tmp_path / "none", tmp_path)["update"] == 3


def test_a_half_written_slot_leaves_the_other(tmp_path, capsys):
    """The machine may die in the middle of a copy."""
    backed_up(tmp_path, 1, 2, 3)
    newest = json.loads((tmp_path / "manifest.json").read_text())["slot"]
    (tmp_path / newest).write_bytes((tmp_path / newest).read_bytes()[:200])
    assert srgan.newest_checkpoint(tmp_path / "none", tmp_path)["update"] == 2
    assert newest in capsys.readouterr().err


def test_the_newest_of_folder_and_backup(tmp_path):
    backed_up(tmp_path / "b", 4, 5)
    saved(tmp_path / "ckpt", 3)
    assert srgan.newest_checkpoint(tmp_path / "ckpt", tmp_path / "b")["update"] == 5
    path = saved(tmp_path / "ckpt", 6)[-1]
    assert srgan.newest_checkpoint(tmp_path / "ckpt", tmp_path / "b")["update"] == 6
    damage(path)
    assert srgan.newest_checkpoint(tmp_path / "ckpt", tmp_path / "b")["update"] == 5


def test_the_newest_waiting_state_wins(tmp_path, monkeypatch):
    """While a copy is under way, later states replace one another."""
    copied, release, started = [], srgan.threading.Event(), srgan.threading.Event()

    def copy(self, checkpoint, update, files):
        copied.append(update)
        started.set()
        assert release.wait(20)

    monkeypatch.setattr(srgan.Backup, "_copy", copy)
    backup = srgan.Backup(tmp_path)
    backup.submit(tmp_path, 1, [])
    assert started.wait(20)
    for update in (2, 3, 4):
        backup.submit(tmp_path, update, [])
    release.set()
    backup.close()
    assert copied == [1, 4]


def test_backup_recovers(tmp_path, monkeypatch, capsys):
    """A folder that fails twice is warned of once, tried again, and then has everything."""
    whole, failures = srgan.Backup._copy, [OSError("Transport endpoint is not connected"), OSError(5, "Input/output error")]

    def copy(self, *job):
        if failures:
            raise failures.pop()
        whole(self, *job)

    monkeypatch.setattr(srgan.Backup, "_copy", copy)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    backup = backed_up(tmp_path, 6)
    assert slots(tmp_path) == {"slot_a.pt": 6} and "update 6" in backup.status
    assert capsys.readouterr().err.count("WARNING") == 1


@pytest.mark.parametrize("folder", [DRIVE, DRIVE / "MyDrive" / "srgan"])
def test_an_unmounted_drive_is_no_folder(folder, monkeypatch, store, tmp_path):
    """Colab would keep the "backup" on its own disk and lose it. Nothing is created there, and no run is begun."""
    monkeypatch.setattr(os.path, "ismount", lambda path: False)
    with pytest.raises(OSError, match="not mounted"):
        srgan.Backup(folder)
    with pytest.raises(OSError, match="not mounted"):
        next(srgan.train(store, tmp_path / "run", "sharp", TINY, backup=folder))
    assert not DRIVE.exists() and not (tmp_path / "run").exists()


def test_a_drive_that_goes_away_is_not_recreated(tmp_path, monkeypatch, capsys):
    backup = srgan.Backup(tmp_path / "b")
    backup.folder = DRIVE / "MyDrive" / "srgan"
    monkeypatch.setattr(os.path, "ismount", lambda path: False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    backup.submit(saved(tmp_path / "ckpt", 1)[0], 1, [])
    backup.close()
    assert not DRIVE.exists() and "not mounted" in capsys.readouterr().err


def test_a_fresh_machine_continues_from_the_backup_alone(store, tmp_path):
    """And ends where the run that was never cut ends."""
    whole, cut, fresh = tmp_path / "whole", tmp_path / "cut", tmp_path / "fresh"
    list(srgan.train(store, whole, "sharp", TINY))
    events = srgan.train(store, cut, "sharp", TINY, backup=tmp_path / "backup")
    for progress in events:
        if progress.step >= 4:
            break
    events.close()
    notes = [note for progress in srgan.train(store, fresh, backup=tmp_path / "backup") for note in progress.notes]
    assert any("continues at update 4 of 6" in note for note in notes)
    last = [srgan.newest_checkpoint(folder / "ckpt") for folder in (whole, fresh)]
    assert same(last[0]["generator"], last[1]["generator"])
    assert (whole / "pretrained.safetensors").exists() and (fresh / "pretrained.safetensors").exists()
    assert [line.split(",")[0] for line in (fresh / "history.csv").read_text().splitlines()] == ["step", *"123456"]
    assert srgan.newest_checkpoint(tmp_path / "none", tmp_path / "backup")["update"] == 6


# --- Exported generators


@pytest.fixture
def exported(tmp_path):
    """A network with BatchNorm, so that there are statistics and a counter besides the weights."""
    config = srgan.Config.preset("report", hr_size=32, channels=8, residual_blocks=1, scale=8)
    generator = srgan.Generator(config).train()
    generator(torch.rand(2, 3, 4, 4))
    srgan.export_generator(tmp_path / "g.safetensors", generator, config, update=3, data={"source": "faces"})
    return tmp_path / "g.safetensors", generator, config


def test_export_round_trip(exported):
    path, generator, config = exported
    loaded, its_config, about = srgan.load_generator(path)
    assert its_config == config and not loaded.training
    assert about["update"] == 3 and about["data"] == {"source": "faces"}
    assert same(dict(loaded.state_dict()), dict(generator.state_dict()))
    lr = torch.rand(1, 3, 5, 6)
    assert torch.equal(loaded(lr), generator.eval()(lr))
    assert [each.name for each in path.parent.iterdir()] == ["g.safetensors"]


def test_a_network_of_another_scale_is_refused(exported):
    assert srgan.load_generator(exported[0], scale=8)[1].scale == 8
    with pytest.raises(ValueError, match=r"g\.safetensors is a network for 8x, not 4x"):
        srgan.load_generator(exported[0], scale=4)


def test_a_damaged_export_is_refused(exported):
    path, numbers = exported[0], random.Random(1)
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little")
    json_length = len(data[8:8 + header].rstrip())  # a space more or less at its end means nothing
    offsets = list(range(9)) + [numbers.randrange(8, 8 + json_length) for _ in range(100)]
    for at in offsets + [numbers.randrange(8 + header, len(data)) for _ in range(60)]:
        flipped = bytearray(data)
        flipped[at] ^= 1 << numbers.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"g\.safetensors"):
            srgan.load_generator(path)
    for length in (0, 5, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"g\.safetensors"):
            srgan.load_generator(path)


def write_text(path):
    path.write_text("not weights at all, but long enough to have a header length")


def write_torch(path):
    torch.save({"w": torch.zeros(3)}, path)


def write_foreign(path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(3)}, path)


def write_foreign_metadata(path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(3)}, path, metadata={"srgan": "[]", "sha256": "no"})


@pytest.mark.parametrize("write", [write_text, write_torch, write_foreign, write_foreign_metadata])
def test_other_files_are_refused(write, tmp_path):
    path = tmp_path / "other.safetensors"
    write(path)
    with pytest.raises(ValueError, match=r"other\.safetensors") as caught:
        srgan.load_generator(path)
    assert "\n" not in str(caught.value)


def test_a_missing_export_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        srgan.load_generator(tmp_path / "none.safetensors")
