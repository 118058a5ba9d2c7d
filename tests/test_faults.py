"""What goes wrong with disks and Drive, injected: nothing is accepted silently, nothing is lost beyond the last save.

    python tests/test_faults.py --flips 300        prints the table in docs/safety.md

The simulated Drive fails as COLAB.md's sources tell of the real one: errors 5, 28, 107 and 122 in the middle of a copy,
a mount that goes away, files cut off. Each fault is a function that checks what must hold and says what happened.
"""

import argparse
import contextlib
import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import TINY
from test_kill import final_state

import srgan_utils as srgan

CHANGES = TINY | {"pretrain_steps": 4, "steps": 6, "save_steps": 2, "sample_steps": 5}


class Drive:
    """A folder that can be made to fail as Google Drive does: `error` is the number of the error that writing raises."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self.folder, self.error, self.failures = folder, None, 0
        folder.mkdir()
        copyfile, write_bytes = shutil.copyfile, Path.write_bytes

        def failing_copy(source, target):
            self._fail(target, Path(source).read_bytes)
            return copyfile(source, target)

        def failing_write(path, data):
            self._fail(path, lambda: data)
            return write_bytes(path, data)

        patch.setattr(shutil, "copyfile", failing_copy)
        patch.setattr(Path, "write_bytes", failing_write)
        patch.setattr(time, "sleep", lambda seconds: None)  # the pauses between two attempts

    def _fail(self, target, content) -> None:
        if self.error and self.folder in Path(target).parents:
            data = content()
            with open(target, "wb") as file:  # it has begun when it fails
                file.write(data[:len(data) // 2])
            self.failures += 1
            raise OSError(self.error, os.strerror(self.error))

    def vanish(self) -> None:
        self.folder.rename(self.folder.with_name("unmounted"))

    def come_back(self) -> None:
        self.folder.with_name("unmounted").rename(self.folder)


def small_store(place: Path) -> srgan.FaceStore:
    return srgan.prepare("synthetic", place / "store", limit=17)


def trained(store: srgan.FaceStore, folder: Path, until: int | None = None, **options) -> list[srgan.Progress]:
    """The events of a run, closed at update `until`."""
    events, seen = srgan.train(store, folder, "sharp", CHANGES, **options), []
    with contextlib.closing(events):
        for event in events:
            seen.append(event)
            if until and event.step >= until:
                break
    return seen


def assert_as_if_nothing_had_happened(store, place: Path, folder: Path) -> None:
    if not (place / "whole").exists():
        trained(store, place / "whole")
    expected, found = (final_state(each, samples=True) for each in (place / "whole", folder))
    assert [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)] == []


def flipped(path: Path, count: int, chance: random.Random):
    """Flip one bit of `path`, `count` times in turn, at random places; yields after each; whole again at the end."""
    whole = path.read_bytes()
    for _ in range(count):
        at = chance.randrange(len(whole))
        data = bytearray(whole)
        data[at] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        yield at
    path.write_bytes(whole)


@contextlib.contextmanager
def refused(*kinds: type[Exception]):
    with pytest.raises(kinds or (ValueError,)) as caught:
        yield
    assert "\n" not in str(caught.value)


# --- Bit flips


def flip_checkpoint(place, flips, chance):
    """The newest on the local disk: refused by name, the one before it is used."""
    store = small_store(place)
    trained(store, place / "run")
    folder = place / "run" / "ckpt"
    for _ in flipped(folder / "update-00000010.pt", flips, chance):
        assert srgan.newest_checkpoint(folder)["update"] == 8
    assert srgan.newest_checkpoint(folder)["update"] == 10
    return "refused and named; continues from the checkpoint before it"


def flip_slot(place, flips, chance):
    store = small_store(place)
    trained(store, place / "run", backup=place / "backup")
    newest = json.loads((place / "backup" / "manifest.json").read_text())["slot"]
    for _ in flipped(place / "backup" / newest, flips, chance):
        assert srgan.newest_checkpoint(place / "none", place / "backup")["update"] < 10
    return "refused and named; continues from the other slot"


def flip_manifest(place, flips, chance):
    store = small_store(place)
    trained(store, place / "run", backup=place / "backup")
    for _ in flipped(place / "backup" / "manifest.json", flips, chance):
        with refused():
            srgan._read_sealed(place / "backup" / "manifest.json", 1, "")
        assert srgan.newest_checkpoint(place / "none", place / "backup")["update"] == 10
    return "passed over; both slots are read, the newest found all the same"


def flip_config(place, flips, chance):
    store = small_store(place)
    trained(store, place / "run")
    for _ in flipped(place / "run" / "config.json", flips, chance):
        with refused():
            trained(store, place / "run")
    (place / "run" / "config.json").unlink()
    assert trained(store, place / "run")[-1].step == 10
    return "refused; once deleted, the run continues with its checkpoint's copy"


def flip_history(place, flips, chance):
    store = small_store(place)
    trained(store, place / "run")
    for _ in flipped(place / "run" / "history.csv", flips, chance):
        trained(store, place / "run")
        assert_as_if_nothing_had_happened(store, place, place / "run")
    return "written anew from the checkpoint when the run continues"


def flip_weights(place, flips, chance):
    store = small_store(place)
    trained(store, place / "run")
    for _ in flipped(place / "run" / "generator.safetensors", flips, chance):
        with refused():
            srgan.load_generator(place / "run" / "generator.safetensors")
    return "refused"


def flip_store(place, flips, chance):
    store = small_store(place)
    for _ in flipped(store.folder / "store.json", flips, chance):
        with refused():
            srgan.FaceStore(store.folder)
    return "refused"


def flip_faces(place, flips, chance):
    store, row = small_store(place), 178 * 178 * 3
    for at in flipped(store.folder / "faces.u8", flips, chance):
        fresh = srgan.FaceStore(store.folder)
        with refused():
            fresh.faces([at // row])
    for _ in flipped(store.folder / "faces.u8", 1, chance):
        with refused():
            small_store(place)
    return "refused at the first use of the block, and by `prepare`"


def interrupted_preparation(place: Path) -> tuple[Path, Path]:
    """A source of 12 faces, and a store of it that was interrupted after two blocks of 4."""
    source, square = place / "faces", srgan._square
    source.mkdir()
    for number in range(12):
        srgan.save_image(torch.rand(3, 178, 178, generator=srgan.seeded(number)), source / f"{number:02}.png")

    def stopping(opened, name):
        if name >= "08":
            raise KeyboardInterrupt
        return square(opened, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(srgan, "_BLOCK", 4)
        patch.setattr(srgan, "_square", stopping)
        with contextlib.suppress(KeyboardInterrupt):
            srgan.prepare(source, place / "cut")
    return source, place / "cut"


def flip_interrupted_store(name: str):
    def fault(place, flips, chance):
        source, cut = interrupted_preparation(place)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(srgan, "_BLOCK", 4)
            expected = {path.name: path.read_bytes() for path in srgan.prepare(source, place / "whole").folder.iterdir()}
            kept = {path.name: path.read_bytes() for path in cut.iterdir()}
            for _ in flipped(cut / name, flips, chance):
                found = srgan.prepare(source, cut).folder
                assert {path.name: path.read_bytes() for path in found.iterdir()} == expected
                shutil.rmtree(cut)
                cut.mkdir()
                for each, data in kept.items():
                    (cut / each).write_bytes(data)
        return "noticed when the preparation continues: done again from there, same store"
    return fault


def flip_zip(place, flips, chance):
    """No face with other pixels; a flipped time stamp changes nothing."""
    place.mkdir(exist_ok=True)
    faces = {f"{number}.png": srgan.synthetic_face(number) for number in range(4)}
    for name, face in faces.items():
        srgan.save_image(face, place / name)
    with zipfile.ZipFile(place / "faces.zip", "w") as archive:
        for name in faces:
            archive.write(place / name, name)
    outcomes = {"refused": 0, "a face left out": 0, "same faces": 0}
    for _ in flipped(place / "faces.zip", flips, chance):
        shutil.rmtree(place / "store", ignore_errors=True)
        try:
            store = srgan.prepare(place / "faces.zip", place / "store")
        except ValueError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
            continue
        for index, name in enumerate(store.names):
            # a name of the right length that the flip changed must still hold some face's own pixels
            stored = store.faces([index]).float() / 255
            assert any(torch.equal(stored, face) for face in faces.values()), name
        outcomes["a face left out" if len(store) < 4 else "same faces"] += 1
    return ", ".join(f"{word}: {count}" for word, count in outcomes.items())


# --- Disks


def disk_full_while_saving(place, flips, chance):
    """By a limit on the size of files, which the checkpoint exceeds."""
    store = small_store(place)
    trained(store, place / "run", until=2)
    small = max(path.stat().st_size for path in (place / "run" / "ckpt").iterdir()) // 2
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (small, limits[1]))
    try:
        with refused(OSError):
            trained(store, place / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert srgan.newest_checkpoint(place / "run" / "ckpt")["update"] >= 2
    trained(store, place / "run")
    assert_as_if_nothing_had_happened(store, place, place / "run")
    return "training stops with one line; continues from the last save"


def disk_full_while_preparing(place, flips, chance):
    source, cut = interrupted_preparation(place)
    assert len(cut.joinpath("faces.u8").read_bytes()) == 8 * 178 * 178 * 3
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9 * 178 * 178 * 3 + 1000, limits[1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(srgan, "_BLOCK", 4)
        try:
            with refused(OSError):
                srgan.prepare(source, cut)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        square, decoded = srgan._square, []
        with patch.context() as again:  # full again, when all that is missing is store.json
            again.setattr(srgan, "_sealed", lambda record: os.truncate(place / "no room", 1))
            with refused(OSError):
                srgan.prepare(source, cut)
        patch.setattr(srgan, "_square", lambda *given: decoded.append(given) or square(*given))
        found = srgan.prepare(source, cut)
        assert not decoded and found.fingerprint == srgan.prepare(source, place / "whole").fingerprint
    return "stops with one line; continues when there is room"


def disk_too_small(place, flips, chance):
    """Said before the first update, for the local disk and for the backup; nothing is left behind."""
    store = small_store(place)
    usage = shutil.disk_usage
    for tight, named in ((place / "run", "run"), (place / "backup", "backup")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=1000 if Path(path) == tight else 10**12))
            for options in ({}, {"for_minutes": 1}):  # which times some updates first
                patch.setattr(srgan, "_one_update", None)
                with refused(OSError), contextlib.closing(
                        srgan.train(store, place / "run", "sharp", CHANGES, backup=place / "backup", **options)) as events:
                    next(events)
        assert not (place / "run").exists(), named
    return "refused before the first update"


def read_only_folder(place, flips, chance):
    """A folder below a regular file: root may write into folders that are only marked read-only."""
    store = small_store(place)
    (place / "file").write_text("")
    for options in ({"folder": place / "file" / "run"}, {"folder": place / "run", "backup": place / "file" / "backup"}):
        with refused(OSError):
            trained(store, **options)
    with refused(OSError):
        srgan.prepare("synthetic", place / "file" / "store", limit=17)
    return "refused before the first update"


# --- Drive


def drive_error(number: int):
    def fault(place, flips, chance):
        store = small_store(place)
        with pytest.MonkeyPatch.context() as patch:
            drive = Drive(place / "drive", patch)
            events = srgan.train(store, place / "run", "sharp", CHANGES | {"sample_steps": 1}, backup=drive.folder / "run")
            for event in events:
                drive.error = number if 2 < event.step < 8 else None
                if event.step == 8:  # it has failed at least once by now
                    deadline = time.perf_counter() + 20
                    while not drive.failures and time.perf_counter() < deadline:
                        os.sched_yield()
        assert drive.failures and event.step == 10
        assert srgan.newest_checkpoint(place / "none", drive.folder / "run")["update"] == 10
        return "training goes on; one warning; the backup is whole again afterwards"
    return fault


def drive_goes_and_comes_back(place, flips, chance):
    store = small_store(place)
    with pytest.MonkeyPatch.context() as patch:
        drive = Drive(place / "drive", patch)
        events = srgan.train(store, place / "run", "sharp", CHANGES | {"sample_steps": 1}, backup=drive.folder / "run")
        for event in events:
            if event.step == 3:
                drive.vanish()
            assert drive.folder.exists() == (event.step < 3 or event.step > 7)
            if event.step == 7:
                drive.come_back()
    assert srgan.newest_checkpoint(place / "none", drive.folder / "run")["update"] == 10
    return "training goes on, no folder is made in its place; whole again afterwards"


def drive_goes_for_good(place, flips, chance):
    store = small_store(place)
    with pytest.MonkeyPatch.context() as patch:
        drive = Drive(place / "drive", patch)
        events = srgan.train(store, place / "run", "sharp", CHANGES, backup=drive.folder / "run")
        for event in events:
            if event.step == 4:
                drive.vanish()
    assert event.step == 10 and not drive.folder.exists() and "failing since" in event.backup
    assert_as_if_nothing_had_happened(store, place, place / "run")
    return "training ends as it would have; what the last backup holds is said"


def drive_cuts_a_slot_off(place, flips, chance):
    """As a session leaves it that ends while Drive is still uploading."""
    store = small_store(place)
    trained(store, place / "run", until=6, backup=place / "drive")
    newest = json.loads((place / "drive" / "manifest.json").read_text())["slot"]
    (place / "drive" / newest).write_bytes(b"")
    shutil.rmtree(place / "run")
    notes = trained(store, place / "run", backup=place / "drive")[0].notes
    assert any("continues at update 4" in note for note in notes)
    last = final_state(place / "run", samples=False)
    trained(store, place / "whole")
    expected = final_state(place / "whole", samples=False)
    assert all(last[name] == expected[name] for name in ("history.csv", "generator.safetensors", "ckpt/update-00000010.pt"))
    return "a fresh machine continues from the other slot"


FAULTS = {
    "bit flip: checkpoint": flip_checkpoint, "bit flip: slot of a backup": flip_slot,
    "bit flip: manifest of a backup": flip_manifest, "bit flip: config.json": flip_config,
    "bit flip: history.csv": flip_history, "bit flip: exported weights": flip_weights,
    "bit flip: store.json": flip_store, "bit flip: faces.u8": flip_faces,
    "bit flip: journal of an interrupted preparation": flip_interrupted_store("journal.jsonl"),
    "bit flip: faces.u8 of an interrupted preparation": flip_interrupted_store("faces.u8"),
    "bit flip: zip of PNGs": flip_zip,
    "disk full in the middle of a checkpoint": disk_full_while_saving,
    "disk full while preparing": disk_full_while_preparing,
    "disk or Drive too small for two checkpoints": disk_too_small,
    "folder that cannot be written": read_only_folder,
    **{f"Drive: error {number} ({os.strerror(number)})": drive_error(number)
       for number in (errno.EIO, errno.ENOSPC, errno.ENOTCONN, errno.EDQUOT)},
    "Drive: the mount goes and comes back": drive_goes_and_comes_back,
    "Drive: the mount goes for good": drive_goes_for_good,
    "Drive: the newest slot has no bytes": drive_cuts_a_slot_off,
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault(name, tmp_path, capsys):
    assert FAULTS[name](tmp_path, 12, random.Random(name))
    if name.startswith("Drive: error"):
        assert capsys.readouterr().err.count("WARNING") == 1


# --- On a real full disk


def full_tmpfs(place: Path) -> str:
    """Training onto a disk that fills up, as root on Linux: another program takes the room that was there at the start."""
    disk = place / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", disk], check=True)
    try:
        store = small_store(place)
        for event in (events := srgan.train(store, disk / "run", "sharp", CHANGES | {"sample_steps": 1})):
            if event.step == 5:
                break
        with contextlib.suppress(OSError), open(disk / "other", "wb") as file:
            while True:
                file.write(bytes(1 << 16))
        with refused(OSError):
            for event in events:
                pass
        (disk / "other").unlink()
        assert srgan.newest_checkpoint(disk / "run" / "ckpt")["update"] >= 4
        assert trained(store, disk / "run")[-1].step == 10
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    return "training stops with one line; continues from the last save"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=300)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}; {args.flips} flips of each file\n\n| fault | what happened |\n|---|---|")
    faults = FAULTS | {"disk full in the middle of a run (a tmpfs of 96 MB)": lambda place, *_: full_tmpfs(place)}
    for name, fault in faults.items():
        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
            with contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
                happened = fault(Path(folder), args.flips, random.Random(name))
        print(f"| {name} | {happened} |", flush=True)


if __name__ == "__main__":
    main()
