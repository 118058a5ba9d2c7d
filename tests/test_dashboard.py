"""Training that one can watch and leave: the panel, its button in a real kernel, the forecast, the zip."""

import csv
import queue
import shutil
import struct
import sys
import time
import zipfile
from base64 import b64decode
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import TINY

import srgan_utils as srgan

LONG = TINY | {"scale": 4, "pretrain_steps": 3, "steps": 100_000, "save_steps": 1_000_000, "sample_steps": 1_000}


@pytest.fixture
def displays(monkeypatch):
    """All that is displayed: a list for each display, of what it showed first and of what replaced it."""
    import IPython.display

    shown = []

    def display(bundle, raw, display_id):
        shown.append([bundle])
        return namedtuple("Handle", "update")(lambda bundle, raw: shown[-1].append(bundle))

    monkeypatch.setattr(IPython.display, "display", display)
    return shown


def test_stopped_by_the_button_it_is_saved_and_ends_as_if_never_stopped(store, tiny_run, tmp_path, displays):
    changes = TINY | {"scale": 4}
    dashboard = srgan.Dashboard(tmp_path / "r")
    for event in dashboard.watch(srgan.train(store, tmp_path / "r", "sharp", changes)):
        if event.step == 2:
            dashboard._button.click()
    assert event.step == 2 and not event.done
    assert srgan.load_generator(tmp_path / "r" / "generator.safetensors")[2]["update"] == 2
    assert "Stopped at update 2 of 6" in displays[0][-1]["text/plain"] and "again to continue" in displays[0][-1]["text/html"]
    for event in srgan.Dashboard(tmp_path / "r").watch(srgan.train(store, tmp_path / "r", "sharp", changes)):
        if event.notes:
            assert event.notes == ["continues at update 2 of 6"] and event.checkpoint.startswith("update 2, ")
    assert displays[1][-1]["text/plain"].startswith("Finished: 6 updates")
    assert displays[1][-1]["text/html"].startswith("<div>continues at update 2 of 6</div>")
    ours, never_stopped = (srgan.load_generator(run / "generator.safetensors")[0] for run in (tmp_path / "r", tiny_run))
    for mine, other in zip(ours.state_dict().values(), never_stopped.state_dict().values()):
        assert torch.equal(mine, other)


def test_it_is_redrawn_in_place(store, tmp_path, displays, monkeypatch):
    """One display whatever happens, the same widgets, pictures of one size; at the end no widget is left to be saved."""
    from ipywidgets.widgets import widget as module

    models = module._instances if hasattr(module, "_instances") else module.Widget.widgets  # of ipywidgets 8, of 7
    before = set(models)
    dashboard, sizes, widgets = srgan.Dashboard(tmp_path / "r"), {"curves": set(), "strip": set()}, set()
    for event in dashboard.watch(srgan.train(store, tmp_path / "r", "sharp", TINY | {"sample_steps": 2})):
        dashboard._curves_due = 0  # drawn at each update, not every five seconds
        dashboard._refresh()
        assert 'role="timer"' in dashboard._widgets["progress"].value and "img/s" in dashboard._widgets["progress"].value
        widgets.add(tuple(widget.model_id for widget in dashboard._widgets.values()))
        for name, seen in sizes.items():
            if value := dashboard._widgets[name].value:
                assert value.startswith('<div style="overflow-x: auto"><img alt="')
                png = b64decode(value.split("base64,")[1].split('"')[0])
                seen.add(struct.unpack(">II", png[16:24]) + (hash(png),))
    assert len(displays) == 1 and len(widgets) == 1
    first, last = displays[0]
    assert "application/vnd.jupyter.widget-view+json" in first and set(last) == {"text/html", "text/plain"}
    for seen in sizes.values():
        assert len(seen) >= 3 and len({size[:2] for size in seen}) == 1  # several pictures, one size
    assert all(widget.comm is None for widget in dashboard._widgets.values()) and set(models) <= before


def test_a_run_that_fails_before_its_first_checkpoint_does_not_look_as_if_it_went_on(store, tmp_path, displays, monkeypatch):
    def fail(*_, **__):
        raise FloatingPointError("the loss is not finite")

    with pytest.raises(FloatingPointError):
        for event in srgan.Dashboard(tmp_path / "r").watch(srgan.train(store, tmp_path / "r", "sharp", TINY | {"save_steps": 9})):
            monkeypatch.setattr(srgan, "_updates", fail)
    last = displays[0][-1]
    assert "Nothing was saved" in last["text/plain"] and "img/s" not in last["text/html"] and "none yet" not in last["text/html"]


def test_without_ipywidgets_it_is_a_picture_that_is_replaced(store, tmp_path, displays, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    for _ in srgan.Dashboard(tmp_path / "r").watch(srgan.train(store, tmp_path / "r", "sharp", TINY)):
        pass
    assert len(displays) == 1 and all("text/html" in bundle for bundle in displays[0][1:])
    assert "Finished: 6 updates" in displays[0][-1]["text/plain"] and displays[0][-1]["text/html"].count("<img alt=") == 2


def test_a_refused_run_shows_nothing_but_the_error(store, tiny_run, displays):
    with pytest.raises(ValueError, match="was started with scale=4"):
        list(srgan.Dashboard(tiny_run).watch(srgan.train(store, tiny_run, "sharp", {"scale": 2})))
    assert displays[0][-1] == {"text/html": "", "text/plain": "nothing was trained"}


def test_ages_of_checkpoint_and_backup(store, tmp_path, monkeypatch):
    now = [1e9]
    monkeypatch.setattr(srgan.time, "time", lambda: now[0])
    monkeypatch.setattr(srgan.Backup, "submit", lambda self, path, update, files: setattr(self, "_good", (update, now[0])))
    seen = []
    for event in srgan.train(store, tmp_path / "r", "sharp", TINY, backup=tmp_path / "b"):
        seen.append((event.step, event.checkpoint, event.backup))
        srgan._LOOPS[(tmp_path / "r").resolve()][0].settle()
        now[0] += 40
    assert seen[0] == (1, "none yet", "no backup yet")
    assert (3, "update 2, 40 s ago", "update 2, 40 s ago") in seen
    assert srgan._age((1200, now[0] - 200), "") == "update 1,200, 3.3 min ago"
    assert srgan._age((1200, now[0] - 7200), "") == "update 1,200, 2.0 h ago"


def test_a_fresh_session_knows_how_old_the_backup_is(tmp_path):
    backup = srgan.Backup(tmp_path / "b")
    backup.submit(srgan.save_checkpoint(tmp_path / "ckpt", {"update": 7}), 7, [])
    backup.close()
    assert srgan.Backup(tmp_path / "b").status.startswith("update 7, ")


# --- The forecast


@pytest.fixture
def paced(monkeypatch):
    """A machine on which an update of pre-training takes a second, an adversarial one three."""
    monkeypatch.setattr(srgan, "_seconds_per_update", lambda *_: (1.0, 3.0))
    monkeypatch.setattr(srgan, "_UPDATING", 1.0)


def test_the_forecast_adds_up(store, tmp_path, paced):
    told = srgan.forecast(store, tmp_path / "r", "sharp", TINY | {"pretrain_steps": 300, "steps": 100})
    assert "starts a new run: 400 updates, about 10 min on this " in told and "WARNING" not in told
    assert not (tmp_path / "r").exists()
    part = srgan.forecast(store, tmp_path / "r", "sharp", TINY | {"pretrain_steps": 300, "steps": 100}, max_minutes=5)
    assert part.splitlines()[-1].startswith("WARNING: 5 min do not suffice") and "about 50 %" in part
    assert "WARNING" not in srgan.forecast(store, tmp_path / "r", "sharp", TINY, max_minutes=0.3)  # 12 s


def test_the_forecast_of_a_run_that_exists(store, tmp_path, paced):
    changes = TINY | {"pretrain_steps": 3, "steps": 103}
    for event in srgan.train(store, tmp_path / "r", "sharp", changes, backup=tmp_path / "b"):
        if event.step == 3:
            break
    del event
    shutil.rmtree(tmp_path / "r")  # a fresh machine
    told = srgan.forecast(store, tmp_path / "r", "sharp", changes, backup=tmp_path / "b")
    assert told.startswith("continues at update 3 of 106, about 5.2 min on this ")  # 103 of 3 s
    with pytest.raises(ValueError, match="was started with scale=4"):
        srgan.forecast(store, tmp_path / "r", "sharp", {"scale": 8}, backup=tmp_path / "b")


def test_a_finished_run_is_said_to_be_finished(store, tiny_run, paced):
    assert srgan.forecast(store, tiny_run) == "finished: all 6 updates are done; more minutes, or more steps, train on"


def test_a_finished_run_can_be_made_longer_by_minutes(store, tiny_run, tmp_path, paced):
    """Only when it is finished: a cut in between does not lengthen it again."""
    assert srgan.longer(store, tmp_path / "new", 1) == {}
    shutil.copytree(tiny_run, tmp_path / "r")
    changes = srgan.longer(store, tmp_path / "r", 0.2)
    assert changes == {"steps": 3 + 4, "decay_steps": 3 + 4}  # 12 s of 3 s each
    events = srgan.train(store, tmp_path / "r", "sharp", {"scale": 4} | changes)
    assert next(events).notes == ["continues at update 6 of 10"]
    events.close()
    assert srgan.longer(store, tmp_path / "r", 0.2) == changes
    for event in srgan.train(store, tmp_path / "r", "sharp", {"scale": 4}):
        pass
    assert event.step == event.total == 10 and srgan.longer(store, tmp_path / "r", 0.2)["steps"] == 3 + 8
    with open(tmp_path / "r" / "history.csv", newline="") as file:
        rates = [float(row["learning_rate"]) for row in csv.DictReader(file)][3:]  # of the adversarial updates
    assert rates[2] < rates[3] and rates[3:] == sorted(rates[3:], reverse=True)  # up again, and down to the new end


def test_minutes_that_set_the_length_need_no_timing(store, tmp_path, monkeypatch):
    monkeypatch.setattr(srgan, "_seconds_per_update", None)
    told = srgan.forecast(store, tmp_path / "r", "sharp", TINY, for_minutes=20, backup=tmp_path / "b")
    assert "a new run of 20 min" in told and "here and on Drive" in told


def test_it_warns_of_colabs_hours_and_of_a_full_disk(store, tmp_path, paced, monkeypatch):
    monkeypatch.setattr(srgan, "in_colab", lambda: True)
    changes = TINY | {"pretrain_steps": 0, "steps": 14_401}  # 12 h and 3 s
    alone, kept = (srgan.forecast(store, tmp_path / "r", "sharp", changes, backup=backup) for backup in (None, tmp_path / "b"))
    assert "after 12 h at most: without a backup on Drive" in alone and "and it continues" in kept
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(srgan.shutil, "disk_usage", lambda _: usage(10**12, 10**12, 1000))
    needs = srgan._size(2 * srgan._checkpoint_bytes(srgan.Config.preset("sharp", **TINY)))
    told = srgan.forecast(store, tmp_path / "r", "sharp", TINY, backup=tmp_path / "b")
    assert told.count(f"has 0.0 MB free and needs {needs} for two checkpoints") == 2  # here, and the backup's


@pytest.mark.parametrize("preset", ["sharp", "report", "paper", "demo"])
def test_epochs_are_passes_over_the_faces(preset):
    config = srgan.Config.preset(preset)
    lasting = config.for_epochs(3, 2000)
    assert abs(lasting.total_steps - 3 * 2000 / config.batch_size) <= 1
    usual = config.for_faces(2000)
    assert abs(lasting.pretrain_steps / lasting.total_steps - usual.pretrain_steps / usual.total_steps) < 0.002
    assert lasting.decay_steps == lasting.steps
    if preset == "report":
        assert lasting == usual


# --- The zip


def test_the_zip_holds_what_one_keeps(store, tiny_run, tmp_path):
    run = tmp_path / "sharp-x4-abc"
    shutil.copytree(tiny_run, run)
    with pytest.raises(FileNotFoundError, match="train first"):
        srgan.export_zip(tmp_path)
    generator, config, _ = srgan.load_generator(run / "generator.safetensors")
    summary = srgan.write_comparison(store, generator, config, run, count=2)
    assert summary["images"] == 2
    packed = srgan.export_zip(run)
    assert packed == run / "sharp-x4-abc.zip" and not list(run.glob("*.part"))
    with zipfile.ZipFile(packed) as archive:
        assert sorted(archive.namelist()) == ["config.json", "generator.safetensors", "history.csv", "metrics.csv",
                                              "metrics.json", "panels.png", "pretrained.safetensors"]
        assert all(archive.read(name) == (run / name).read_bytes() for name in archive.namelist())
    (run / "pretrained.safetensors").unlink()  # stopped in pre-training
    with zipfile.ZipFile(srgan.export_zip(run)) as archive:
        assert "pretrained.safetensors" not in archive.namelist()


@pytest.fixture
def export(tmp_path, monkeypatch):
    """The export button of a run that is not there yet, what it says, and the files that its link was pointed to."""
    import IPython.display

    shown, linked = [], []
    handle = namedtuple("Handle", "update")(lambda link: linked.append(link.path))
    monkeypatch.setattr(IPython.display, "display", lambda each, display_id=None: shown.append(each) or handle)
    assert srgan.export_button(tmp_path / "r") is None
    return *shown[0].children, linked


def test_the_export_button_says_what_is_missing_and_then_links(tiny_run, tmp_path, export):
    button, said, linked = export
    assert button.description == "Export as zip" and not linked
    button.click()
    assert "train first" in said.value and not linked
    shutil.copytree(tiny_run, tmp_path / "r")
    button.click()
    assert said.value.startswith("r.zip, ") and "generator.safetensors" in said.value
    path, = linked
    assert not Path(path).is_absolute() and Path(path).resolve() == tmp_path / "r" / "r.zip"


# --- In a real kernel, whose main thread is busy while the button is clicked


def wait_for(client, wanted):
    """The first message on iopub for which `wanted` is true."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        try:
            message = client.get_iopub_msg(timeout=5)
        except queue.Empty:
            continue
        if wanted(message):
            return message
    raise AssertionError("no such message in two minutes")


def is_button(message):
    return message["msg_type"] == "comm_open" and message["content"]["data"]["state"].get("_model_name") == "ButtonModel"


def trains(message):
    state = message["content"].get("data", {}).get("state", {}) if message["msg_type"] == "comm_msg" else {}
    return "adversarial: update" in str(state.get("value"))


def says(text):
    return lambda message: message["msg_type"] == "stream" and text in message["content"]["text"]


def ends(message):
    return message["msg_type"] == "update_display_data" and "Stopped at update" in message["content"]["data"]["text/plain"]


@pytest.fixture
def kernel():
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_a_click_reaches_a_busy_kernel_and_the_next_cell_waits(store, tmp_path, kernel):
    manager, client = kernel
    root = Path(srgan.__file__).parent
    client.execute(f"import sys; sys.path.insert(0, {str(root)!r})\nimport srgan_utils as srgan\n"
                   f"store = srgan.FaceStore({str(store.folder)!r})")
    cell = (f"for event in srgan.Dashboard({str(tmp_path / 'r')!r}).watch(srgan.train(store, {str(tmp_path / 'r')!r}, 'sharp', "
            f"{LONG!r})): pass")
    client.execute(cell)
    after = f"print('after', event.step, srgan.newest_checkpoint({str(tmp_path / 'r' / 'ckpt')!r})['update'])"
    client.execute(after)  # Run all has sent the next cell long before the click
    button = wait_for(client, is_button)["content"]["comm_id"]
    wait_for(client, trains)
    click = {"comm_id": button, "data": {"method": "custom", "content": {"event": "click"}}}
    client.shell_channel.send(client.session.msg("comm_msg", click))
    wait_for(client, ends)
    _, step, saved = wait_for(client, says("after"))["content"]["text"].split()
    assert step == saved and 3 <= int(step) < 100_003
    client.execute(cell)  # goes on, until the notebook's own stop button, which stops the queued cells, too
    wait_for(client, lambda message: f"continues at update {int(step):,} of 100,003" in str(message["content"]))
    wait_for(client, trains)
    manager.interrupt_kernel()
    wait_for(client, ends)
    assert wait_for(client, lambda message: message["msg_type"] == "error")["content"]["ename"] == "KeyboardInterrupt"
    while client.execute(after, reply=True, timeout=60)["content"]["status"] == "aborted":
        pass  # the kernel still empties its queue
    _, later, saved = wait_for(client, says("after"))["content"]["text"].split()
    assert int(saved) >= int(later) >= int(step)  # the loop did not see the last update, which the interrupt waited for
