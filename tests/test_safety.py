"""Two at once, what a cell leaves behind, room on the disk, Ctrl-C, and downloads that break off."""

import functools
import gc
import http.server
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from conftest import TINY
from test_checkpoints import saved
from test_training import LONG, assert_same_run, run

import srgan_utils as srgan

# --- Locks


def hold(folder: Path) -> subprocess.Popen:
    """Another process that holds `folder` until it is killed."""
    code = ("import pathlib, time, srgan_utils as srgan\n"
            f"with srgan._locked(pathlib.Path({str(folder)!r})):\n    print('held', flush=True)\n    time.sleep(600)")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(srgan.__file__).parent)
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_says_who_holds_a_run_or_a_store(store, tmp_path, capsys):
    """And a killed owner's lock frees itself."""
    process = hold(tmp_path)
    try:
        for work in (lambda: run(store, tmp_path, "sharp", TINY), lambda: srgan.prepare("synthetic", tmp_path, limit=17)):
            with pytest.raises(BlockingIOError, match=rf"is in use by process {process.pid} \(since .*: wait until") as caught:
                work()
            assert "\n" not in str(caught.value)
        assert srgan.main(["train", "--store", str(store.folder), "--run", str(tmp_path)]) == 2
        assert f"process {process.pid}" in capsys.readouterr().err.splitlines()[-1]
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    finally:
        process.kill()
        process.wait()
    assert run(store, tmp_path, "sharp", TINY)[-1].done
    assert not (tmp_path / "lock").exists()


def test_a_store_that_another_process_finished_meanwhile_is_taken_as_it_is(tmp_path, monkeypatch):
    first = srgan.prepare("synthetic", tmp_path / "other", limit=17)
    opened = srgan.open_source

    def meanwhile(source):
        shutil.copytree(first.folder, tmp_path / "store")
        return opened(source)

    monkeypatch.setattr(srgan, "open_source", meanwhile)
    monkeypatch.setattr(srgan, "_fill_store", None)  # not called
    assert srgan.prepare("synthetic", tmp_path / "store", limit=17).fingerprint == first.fingerprint


# --- Loops that were left


def test_a_loop_that_a_cell_left_behind_is_taken_over(store, tmp_path):
    """IPython keeps the frame of a cell that failed, and with it the generator: running the cell again must work."""
    run(store, tmp_path / "whole", "sharp", LONG)
    left = srgan.train(store, tmp_path / "r", "sharp", LONG)
    while next(left).step < 3:
        pass
    events = run(store, tmp_path / "r", "sharp", LONG)
    assert "continues at update 3 of 9" in events[0].notes and events[-1].step == 9
    with pytest.raises(ValueError, match="trained by a newer call"):
        next(left)
    assert_same_run(tmp_path / "r", tmp_path / "whole")


def test_what_was_taken_over_gives_its_networks_back(store, tmp_path):
    """IPython keeps the loop; a GPU has no room for its networks beside the new ones."""
    left = srgan.train(store, tmp_path / "r", "sharp", LONG)
    next(left)
    old, _ = srgan._LOOPS[tmp_path / "r"]
    networks = weakref.ref(old.state.discriminator)
    new = srgan.train(store, tmp_path / "r", "sharp", LONG)
    next(new)
    gc.collect()
    assert networks() is None and left
    new.close()


def test_a_run_that_was_deleted_begins_anew(store, tmp_path):
    left = srgan.train(store, tmp_path / "r", "sharp", LONG)
    next(left)
    shutil.rmtree(tmp_path / "r")
    events = run(store, tmp_path / "r", "sharp", TINY)
    assert events[0].notes == [] and events[-1].step == 6


@pytest.mark.parametrize("last", ["break", "raise ValueError('in the loop')"])
def test_a_script_that_ends_in_its_loop_saves(store, tmp_path, last):
    """The generator is still there when the interpreter exits."""
    script = tmp_path / "script.py"
    script.write_text(f"""import srgan_utils as srgan
events = srgan.train(srgan.FaceStore({str(store.folder)!r}), {str(tmp_path / "r")!r}, "sharp", {LONG!r})
for event in events:
    if event.step == 5:
        {last}
""")
    subprocess.run([sys.executable, script], env=os.environ | {"PYTHONPATH": str(Path(srgan.__file__).parent)}, timeout=120,
                   stderr=subprocess.PIPE)
    assert srgan.newest_checkpoint(tmp_path / "r" / "ckpt")["update"] == 5


def test_options_that_were_refused_hold_nothing(store, tmp_path):
    """Nor does an error whose traceback is kept."""
    for _ in range(2):
        with pytest.raises(ValueError, match="out of range") as kept:
            run(store, tmp_path / "r", "sharp", TINY | {"batch_size": 0})
        assert kept.tb and not (tmp_path / "r").exists()
    assert run(store, tmp_path / "r", "sharp", TINY)[-1].done


def test_a_thread_that_trains_is_not_taken_over(store, tmp_path, monkeypatch):
    """Only between two updates is what is in memory whole."""
    inside, go_on, update = threading.Event(), threading.Event(), srgan._one_update

    def slow(*args):
        inside.set()
        assert go_on.wait(60)
        return update(*args)

    monkeypatch.setattr(srgan, "_one_update", slow)
    events: list = []
    thread = threading.Thread(target=lambda: events.extend(srgan.train(store, tmp_path / "r", "sharp", TINY)))
    thread.start()
    assert inside.wait(60)
    with pytest.raises(BlockingIOError, match=f"process {os.getpid()}"):
        run(store, tmp_path / "r", "sharp", TINY)
    go_on.set()
    thread.join()
    assert events[-1].done


def test_a_polite_kill_saves_first(store, tmp_path, monkeypatch):
    """SIGTERM, as cluster schedulers and `timeout` send it."""
    update, calls = srgan._one_update, []

    def terminated(*args):
        calls.append(args)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGTERM)
        return update(*args)

    monkeypatch.setattr(srgan, "_one_update", terminated)
    with pytest.raises(KeyboardInterrupt, match="stopped at update 5 of 9; saved"):
        run(store, tmp_path / "r", "sharp", LONG)
    assert srgan.newest_checkpoint(tmp_path / "r" / "ckpt")["update"] == 5
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_steps_raised_halfway_give_what_they_give_without_a_stop(store, tmp_path):
    for name, stops in (("straight", []), ("stopped", [5, 7, 10])):
        folder = tmp_path / name
        for stop, changes in ((4, LONG), *((stop, {"steps": 8}) for stop in stops), (12, {"steps": 8})):
            events = srgan.train(store, folder, None if (folder / "config.json").exists() else "sharp", changes)
            for event in events:
                if event.step >= stop:
                    break
            events.close()
        assert event.step == 12
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


# --- Checkpoints in the background


def test_training_goes_on_while_a_checkpoint_is_written(store, tmp_path, monkeypatch):
    """From a copy in memory: what is written is the state at the save, not that of the updates since."""
    run(store, tmp_path / "whole", "sharp", TINY | {"save_steps": 1000})
    release, save, seen = threading.Event(), srgan.save_checkpoint, []

    def slow(folder, content):
        assert release.wait(60)
        seen.append(content["update"])
        return save(folder, content, keep=9)

    monkeypatch.setattr(srgan, "save_checkpoint", slow)
    changes = TINY | {"save_steps": 2, "sample_steps": 1, "pretrain_steps": 6, "steps": 0}
    run_whole = tmp_path / "one"
    for event in srgan.train(store, run_whole, "sharp", changes):
        if event.step == 3:  # an update later, nothing is written yet
            assert not list(run_whole.glob("ckpt/*")) and seen == []
            release.set()
    assert seen == [2, 4, 6]
    other = tmp_path / "two"
    events = srgan.train(store, other, "sharp", changes)
    while next(events).step < 2:
        pass
    events.close()
    early, late = (srgan.load_checkpoint(folder / "ckpt" / "update-00000002.pt") for folder in (run_whole, other))
    assert all(torch.equal(early["generator"][name], late["generator"][name]) for name in early["generator"])
    assert early["g_optimizer"]["state"][0]["step"] == 2


def test_what_cannot_be_written_stops_the_run(store, tmp_path, monkeypatch):
    """Though it is another thread that fails."""
    def fail(folder, content):
        raise OSError("no room")

    monkeypatch.setattr(srgan, "save_checkpoint", fail)
    with pytest.raises(OSError, match="no room"):
        run(store, tmp_path / "r", "sharp", TINY | {"save_steps": 2, "pretrain_steps": 500})


def test_the_size_of_a_checkpoint_is_told_and_right(store, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(srgan, "_one_update", None)  # told before the first update, also before those that are timed
    with pytest.raises(TypeError):
        run(store, tmp_path / "r", "sharp", TINY, for_minutes=1)
    monkeypatch.undo()
    told = capsys.readouterr().out
    run(store, tmp_path / "r", "sharp", TINY)
    sizes = [path.stat().st_size for path in (tmp_path / "r" / "ckpt").iterdir()]
    expected = srgan._checkpoint_bytes(srgan.Config.preset("sharp", **TINY))
    assert sizes[0] == pytest.approx(expected, rel=0.05)
    assert told.startswith(f"checkpoints of {expected / 1e6:.1f} MB each")


def test_the_size_of_the_reports_checkpoint():
    """Adam keeps two moments of every weight: three times all weights, of 138.9 million in the discriminator alone."""
    config = srgan.Config.preset("report")
    with torch.device("meta"):
        networks = srgan.Generator(config), srgan.Discriminator(config)
    weights = sum(p.numel() for network in networks for p in network.parameters())
    size = srgan._checkpoint_bytes(config)
    assert weights > 138_908_865 and size == pytest.approx(12 * weights, rel=1e-3) and 1.6e9 < size < 1.8e9


def test_a_disk_with_room_for_two_makes_room_first(tmp_path, monkeypatch):
    """Where a third would not fit, the oldest goes before the newest comes, not after."""
    size = saved(tmp_path, 1, 2, keep=2)[0].stat().st_size
    seen, save = [], torch.save
    usage = shutil.disk_usage(tmp_path)
    for free, expected in ((size // 2, ["update-00000002.pt"]), (10 * size, ["update-00000002.pt", "update-00000003.pt"])):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        monkeypatch.setattr(torch, "save", lambda *args: seen.append(sorted(p.name for p in tmp_path.glob("*.pt")))
                            or save(*args))
        saved(tmp_path, 3 + len(seen), keep=2)
        assert seen[-1] == expected


def test_a_damaged_newest_is_not_what_is_kept(tmp_path, monkeypatch):
    """On a tight disk, where the older one makes room."""
    first, second = saved(tmp_path, 1, 2, keep=2)
    second.write_bytes(second.read_bytes()[:-1] + b"?")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    monkeypatch.setattr(torch, "save", lambda *args: os.stat(tmp_path / "no room"))
    with pytest.raises(OSError, match="update 3 cannot be written"):
        saved(tmp_path, 3, keep=2)
    assert srgan.newest_checkpoint(tmp_path)["update"] == 1


def test_weights_do_not_change_with_their_file(store, tiny_run, tmp_path):
    """Drive may overwrite it, or go, while the network is in use."""
    path = tmp_path / "g.safetensors"
    path.write_bytes((tiny_run / "generator.safetensors").read_bytes())
    generator = srgan.load_generator(path)[0]
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    with open(path, "r+b") as file:
        file.seek(-4000, os.SEEK_END)
        file.write(bytes(4000))
        file.truncate(100)
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())


@pytest.mark.parametrize("spoilt", [{"scale": "x"}, {"scale": math.inf}, {"growth_factor": [1]}, {"_growth_tracker": None}])
def test_a_loss_scalers_state_is_numbers(monkeypatch, spoilt):
    """As on a T4; the scaler is made by hand here, since it is disabled on a CPU."""
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    good = scaler.state_dict()
    srgan._load_part(scaler, good)
    with pytest.raises(ValueError):
        srgan._load_part(scaler, good | spoilt)


# --- Drive that is not there


@pytest.mark.parametrize("place", ["/content/drive/MyDrive/r", "/content/../content/drive/r"])
def test_no_command_makes_a_folder_where_drive_is_not_mounted(store, tiny_run, place, capsys):
    faces, weights = ["--store", str(store.folder)], ["--weights", str(tiny_run / "generator.safetensors")]
    for command in (["train", *faces, "--run", place], ["prepare", "synthetic", "--store", place],
                    ["train", *faces, "--run", "r", "--backup", place], ["compare", *faces, *weights, "--out", place]):
        assert srgan.main(command) == 2
        assert "is not mounted" in capsys.readouterr().err
    with pytest.raises(OSError, match="is not mounted"):
        run(store, place, "sharp", TINY)
    assert not Path("/content/drive").exists()


# --- Backup


def test_a_backup_that_another_session_has_taken_over_is_left_alone(tmp_path, monkeypatch, capsys):
    """Two machines, one Drive: the one that began last goes on."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    checkpoint, = saved(tmp_path / "ckpt", 1)
    older = srgan.Backup(tmp_path / "b")
    older.submit(checkpoint, 1, [])
    while "update 1" not in older.status:
        time.sleep(0)
    newer = srgan.Backup(tmp_path / "b")
    newer.submit(checkpoint, 2, [])
    newer.close()
    older.submit(checkpoint, 3, [])
    older.close()
    assert "a session that began later" in capsys.readouterr().err
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["update"] == 2


def test_a_dying_session_does_not_stop_the_one_that_began_later(tmp_path):
    """Its first copy may come after the new one has looked."""
    checkpoint, = saved(tmp_path / "ckpt", 1)
    older, newer = srgan.Backup(tmp_path / "b"), srgan.Backup(tmp_path / "b")
    for backup, update in ((older, 1), (newer, 2)):
        backup.submit(checkpoint, update, [])
        backup.close()
        assert json.loads((tmp_path / "b" / "manifest.json").read_text())["update"] == update


def test_one_upload_at_a_time(tmp_path, monkeypatch):
    """Also where the thread of a loop that was stopped twice is still copying."""
    checkpoint, = saved(tmp_path / "ckpt", 1)
    under_way, most, copy = [], [], srgan.Backup._copy

    def watched(self, *job):
        under_way.append(job)
        most.append(len(under_way))
        time.sleep(0.1)
        copy(self, *job)
        under_way.remove(job)

    monkeypatch.setattr(srgan.Backup, "_copy", watched)
    # folders of their own: in one, an older session that comes second is refused, whichever of the threads that is
    backups = [srgan.Backup(tmp_path / f"b{number}") for number in range(3)]
    for update, backup in enumerate(backups):
        backup.submit(checkpoint, update, [])
    for backup in backups:
        backup.close()
    assert most == [1, 1, 1]


def test_a_backup_that_fails_to_the_end_says_so_at_the_end(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(srgan.Backup, "_copy", lambda *_: os.stat(tmp_path / "gone"))
    assert run(store, tmp_path / "r", "sharp", TINY, backup=tmp_path / "b")[-1].done
    assert "is not complete; last good backup: no backup yet, failing since" in capsys.readouterr().err.splitlines()[-1]


def test_what_a_killed_process_saved_but_did_not_back_up_is_backed_up(store, tmp_path):
    """It finished the run and died before the copy: continuing has nothing to train, but something to copy."""
    run(store, tmp_path / "r", "sharp", TINY)
    assert run(store, tmp_path / "r", backup=tmp_path / "b")[-1].done
    assert srgan.newest_checkpoint(tmp_path / "none", tmp_path / "b")["update"] == 6
    assert (tmp_path / "b" / "generator.safetensors").read_bytes() == (tmp_path / "r" / "generator.safetensors").read_bytes()


def test_a_half_written_config_in_the_backup_keeps_no_machine_from_continuing(store, tmp_path):
    events = srgan.train(store, tmp_path / "r", "sharp", LONG, backup=tmp_path / "b")
    while next(events).step < 5:
        pass
    events.close()
    (tmp_path / "b" / "config.json").write_bytes(b"{")
    events = run(store, tmp_path / "fresh", backup=tmp_path / "b")
    assert "continues at update 5 of 9" in events[0].notes and events[-1].step == 9
    assert (tmp_path / "b" / "config.json").read_bytes() == (tmp_path / "fresh" / "config.json").read_bytes()


# --- Downloads


class Breaking(http.server.BaseHTTPRequestHandler):
    """Serves `whole`, but breaks off after `at` bytes of each reply; with or without ranges."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *args, whole, at, ranges, log):
        self.whole, self.at, self.ranges, self.log = whole, at, ranges, log
        super().__init__(*args)

    def do_GET(self):
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.ranges else 0
        self.log.append(start)
        if start >= len(self.whole):
            self.send_error(416)
            return
        self.send_response(206 if asked and self.ranges else 200)
        if asked and self.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(self.whole) - 1}/{len(self.whole)}")
        self.send_header("Content-Length", str(len(self.whole) - start))
        self.end_headers()
        self.wfile.write(self.whole[start:start + self.at])
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def served(monkeypatch):
    """`served(whole, at, ranges)`: the address of such a server, and the first bytes that it is asked for."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    servers = []

    def serve(whole, at=math.inf, ranges=True):
        log = []
        handler = functools.partial(Breaking, whole=whole, at=min(at, len(whole)), ranges=ranges, log=log)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/f.zip", log

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


WHOLE = torch.randint(256, (100_000,), dtype=torch.uint8, generator=srgan.seeded(3)).numpy().tobytes()


def test_a_download_that_breaks_off_is_taken_up_where_it_broke(served, tmp_path):
    url, log = served(WHOLE, at=30_000)
    srgan._download(url, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == WHOLE and log == [0, 30_000, 60_000, 90_000]
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_host_that_cannot_continue_is_asked_for_all(served, tmp_path):
    (tmp_path / "f.part").write_bytes(b"x" * 500)
    url, log = served(WHOLE, ranges=False)
    srgan._download(url, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == WHOLE


def test_a_later_call_continues_what_an_earlier_one_left(served, tmp_path):
    url, log = served(WHOLE, at=15_000)
    with pytest.raises(OSError, match="the connection broke after 0.1 MB of 0.1 MB"):
        srgan._download(url, tmp_path / "f")
    assert not (tmp_path / "f").exists() and log == [0, 15_000, 30_000, 45_000, 60_000]
    srgan._download(served(WHOLE)[0], tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == WHOLE


def test_more_than_the_host_has_is_fetched_anew(served, tmp_path):
    (tmp_path / "f.part").write_bytes(b"x" * 200_000)
    url, log = served(WHOLE)
    srgan._download(url, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == WHOLE and log == [200_000, 0]


QUOTA = b"""<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head><body><p class="uc-error-caption">
Sorry, you can&#39;t view or download this file at this time.</p></body></html>"""


def test_a_quota_page_is_called_what_it_is(served, tmp_path, capsys):
    """By a download, by a zip that is none, and in CelebA's place."""
    with pytest.raises(OSError, match=r"a web page \('Google Drive - Quota exceeded'\) in place of the file"):
        srgan._download(served(QUOTA)[0], tmp_path / "f")
    assert list(tmp_path.iterdir()) == []
    path = tmp_path / "img_align_celeba.zip"
    path.write_bytes(QUOTA)
    with pytest.raises(ValueError, match="is a web page .*Quota exceeded.*, not a zip"):
        srgan.open_source(path)
    assert srgan._celeba_at(tmp_path) is None and "Quota exceeded" in capsys.readouterr().out
