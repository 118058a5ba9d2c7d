"""Checkpoints, the copies on Drive and exported generators: what is written comes back whole, or is refused by name."""

import json
import os
import random
import shutil
import struct
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import TINY, plain, refused
from safetensors.torch import save_file

import srgan_utils as srgan


def damage(path, chance=random.Random(0)):
    """Flip a random bit of the numbers in its tensors."""
    data, places = bytearray(path.read_bytes()), []
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if "/data/" in info.filename:
                start = info.header_offset + 30 + sum(struct.unpack_from("<HH", data, info.header_offset + 26))
                places += range(start, start + info.file_size)
    data[chance.choice(places)] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def sitting(store, folder, backup, count=1):
    """So many updates of a run, one to a sitting; the notes of the last one's first event."""
    for _ in range(count):
        events = list(srgan.train(store, folder, None, TINY, backup=backup, max_minutes=1e-9))
    return events[0].notes


def slots(folder):
    return {path.name: srgan.load_checkpoint(path)["update"] for path in folder.glob("slot_*.pt")}


@pytest.fixture(scope="module")
def lost(store, small, tmp_path_factory):
    """A run that was not lost, at its end, and the backup that it had after four updates."""
    place = tmp_path_factory.mktemp("lost")
    sitting(store, place / "r", place / "b", 4)
    sitting(store, place / "r", None, 2)
    return place


def test_a_damaged_checkpoint_is_refused_by_name(lost, tmp_path):
    """Any flipped bit of a tensor is noticed, any file cut off, and any other."""
    path = Path(shutil.copy(lost / "r" / "ckpt" / "update-00000006.pt", tmp_path))
    data, whole = path.read_bytes(), srgan.load_checkpoint(path)
    assert plain(torch.load(path, weights_only=True)) == plain(whole) and whole["update"] == 6
    spoilings = [lambda: damage(path)] * 100 + [lambda length=length: path.write_bytes(data[:length])
                                                for length in (0, 1, 63, len(data) // 2, len(data) - 1)]
    spoilings += [lambda other=other: torch.save(other, path) for other in ([1], torch.zeros(3), {"step": 3}, {"update": "3"})]
    for spoil in spoilings:
        spoil()
        with refused(ValueError, "update-00000006"):
            srgan.load_checkpoint(path)
        path.write_bytes(data)


class Evil(str):
    """Makes a folder of this name when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (str(self),)


def test_code_in_a_file_is_not_run(lost, tmp_path):
    """Of a checkpoint, a slot of a backup, weights, or VGG's; and the older checkpoint is found all the same."""
    made, backup = tmp_path / "made", tmp_path / "backup"
    backup.mkdir()
    for value in (Evil(made), {"update": 7, "x": Evil(made)}, {Evil(made): 1, "update": 7}):
        for path, use in ((tmp_path / "update-00000007.pt", srgan.load_checkpoint), (backup / "slot_a.pt", srgan.load_checkpoint),
                          (tmp_path / "g.safetensors", srgan.load_generator),
                          (tmp_path / "vgg.pt", lambda path: srgan.VGGFeatures(srgan.Config(vgg=str(path))))):
            torch.save(value, path)
            with refused(ValueError, path.name):
                use(path)
        shutil.copy(lost / "r" / "ckpt" / "update-00000006.pt", tmp_path)
        assert srgan.newest_checkpoint(tmp_path, backup)["update"] == 6 and not made.exists()


def test_the_newest_two_are_kept_and_damaged_ones_passed_over_by_name(store, lost, tmp_path, capsys):
    run, backup = shutil.copytree(lost / "r", tmp_path / "r"), shutil.copytree(lost / "b", tmp_path / "b")
    paths = sorted((run / "ckpt").iterdir())
    assert [path.name for path in paths] == ["update-00000005.pt", "update-00000006.pt"]
    damage(paths[1])
    assert srgan.newest_checkpoint(run / "ckpt")["update"] == 5 and paths[1].name in capsys.readouterr().err
    damage(paths[0])
    with refused(ValueError, r"00006.*00005"):  # never as if there were none
        srgan.newest_checkpoint(run / "ckpt")
    damage(backup / max(slots(backup), key=slots(backup).get))
    assert "continues at update 3 of 6" in sitting(store, run, backup)
    assert srgan.newest_checkpoint(run / "ckpt")["update"] == 4  # what is written stays, beside damaged ones of later updates
    assert srgan.newest_checkpoint(tmp_path / "none", tmp_path / "no backup") is None


def test_the_backup_has_two_slots_that_are_written_in_turn(store, tmp_path, small, monkeypatch):
    """So that one is whole at any time; over several sittings and within one."""
    run, backup, copies, copyfile = tmp_path / "r", tmp_path / "b", [], shutil.copyfile
    monkeypatch.setattr(shutil, "copyfile", lambda *paths: copies.append(Path(paths[1]).name) or copyfile(*paths))
    sitting(store, run, None)
    for update in (2, 3, 4):
        sitting(store, run, backup)
        assert sorted(slots(backup).values()) == [2, 3, 4][max(0, update - 3):update - 1]
    for _ in srgan.train(store, run, None, {"steps": 9, "save_steps": 1, "sample_steps": 1}, backup=backup):
        time.sleep(0.02)
    written = [name for name in copies if name.startswith("slot")]
    assert len(written) > 5 and all(one != other for one, other in zip(written, written[1:]))
    small = {"config.json", "history.csv", "pretrained.safetensors", "generator.safetensors"}
    assert max(slots(backup).values()) == 12 and {path.name for path in backup.iterdir()} == small | slots(backup).keys()
    assert all((backup / name).read_bytes() == (run / name).read_bytes() for name in small)


@pytest.mark.parametrize("spoil", [None, damage, lambda path: path.write_bytes(path.read_bytes()[:200])],
                         ids=["whole", "damaged", "half written"])
def test_a_fresh_machine_goes_on_from_drive_alone(store, tmp_path, lost, capsys, spoil):
    """From the slot of the larger update that verifies; the other one is written first. It ends where it would have."""
    run, backup, fresh = lost / "r", shutil.copytree(lost / "b", tmp_path / "b"), tmp_path / "fresh"
    newest, update = max(slots(backup), key=slots(backup).get), 3 if spoil else 4
    if spoil:
        spoil(backup / newest)
    (backup / "config.json").write_bytes(b"{")  # half written: it is not needed
    assert f"continues at update {update} of 6" in sitting(store, fresh, backup)
    assert sorted(slots(backup).values()) == [update, update + 1] and bool(spoil) == (newest in capsys.readouterr().err)
    sitting(store, fresh, backup, 5 - update)
    one, other = (srgan.newest_checkpoint(folder / "ckpt") for folder in (run, fresh))
    assert other["update"] == 6 and all(plain(one[name]) == plain(other[name]) for name in ("generator", "ema"))
    assert [line.split(",")[0] for line in (fresh / "history.csv").read_text().splitlines()] == ["step", *"123456"]
    assert (fresh / "pretrained.safetensors").read_bytes() == (run / "pretrained.safetensors").read_bytes()


@pytest.fixture
def exported(tmp_path):
    """A network with BatchNorm, so that there are statistics and a counter besides the weights."""
    config = srgan.Config.preset("report", hr_size=32, channels=8, residual_blocks=1, scale=8)
    generator = srgan.Generator(config).train()
    generator(torch.rand(2, 3, 4, 4))
    srgan.export_generator(tmp_path / "g.safetensors", generator, config, update=3, data={"source": "faces"})
    return tmp_path / "g.safetensors", generator.eval(), config


def test_an_exported_network_is_the_network_also_when_its_file_goes(exported):
    path, generator, config = exported
    loaded, its_config, about = srgan.load_generator(path, scale=8)
    assert about == {"config": asdict(config), "update": 3, "data": {"source": "faces"}} and its_config.hr_size == 32
    assert [each.name for each in path.parent.iterdir()] == [path.name] and not loaded.training
    with open(path, "r+b") as file:  # as Drive does, while it is in use
        file.seek(-4000, os.SEEK_END)
        file.write(bytes(4000))
        file.truncate(100)
    lr, own = torch.rand(1, 3, 5, 6), generator.state_dict()
    assert torch.equal(loaded(lr), generator(lr)) and all(value.equal(own[name]) for name, value in loaded.state_dict().items())


def test_weights_go_on_loading_when_fields_of_runs_change_and_others_are_refused(exported):
    """A field that does not shape the network may be new, odd or gone; for one that does, a default stands."""
    path, generator, config = exported
    state, lr = {name: value.contiguous() for name, value in generator.state_dict().items()}, torch.rand(1, 3, 5, 6)

    def load(tensors=state, scale=None, **fields):
        record = {name: value for name, value in (asdict(config) | fields).items() if value != "gone"}
        save_file(tensors, path, metadata={"srgan": json.dumps({"config": record})})
        return srgan.load_generator(path, scale)

    loaded, its_config, _ = load(new=1, adversarial="relativistic", seed="gone", batch_size=-3, crop="gone")
    assert torch.equal(loaded(lr), generator(lr)) and its_config.crop == 176
    for fields in ({"channels": 16}, {"channels": 10**9}, {"scale": 3}, {"output": "a\x1b[2J\nb"}, {"batch_norm": 0},
                   {"residual_blocks": [1]}, {"shared_upsampling": "gone"}):
        with refused(ValueError, r"g\.safetensors"):
            load(**fields)
    for other in (dict(list(state.items())[1:]), state | {"a\nb": lr}, {name: v.flatten() for name, v in state.items()}):
        with refused(ValueError, r"g\.safetensors"):
            load(other)
    with refused(ValueError, r"g\.safetensors is a network for 8x, not 4x"):
        load(scale=4)


def test_other_files_are_refused_in_one_line(exported):
    path, data, foreign = exported[0], exported[0].read_bytes(), {"w": torch.zeros(3)}
    for write in (lambda: path.write_bytes(b"no weights at all, but as long as a header's length"),
                  lambda: path.write_bytes(b""), lambda: path.write_bytes(data[:-1]),
                  lambda: torch.save(foreign, path), lambda: save_file(foreign, path),
                  lambda: save_file(foreign, path, metadata={"srgan": "[]"})):
        write()
        with refused(ValueError, r"g\.safetensors"):
            srgan.load_generator(path)
    with refused(FileNotFoundError, r"none\.safetensors"):
        srgan.load_generator(path.with_name("none.safetensors"))
