"""Runs that are stopped, continued, changed, forecast and broken; their precision; the report's own."""

import functools
import json
import math
import os
import shutil
import signal
import time
from unittest import mock

import pytest
import torch
from conftest import TINY, final_state, plain, refused, rows
from test_losses import changed, images, tiny_state

import srgan_utils as srgan

SIGNALS, WHOLE_DISCRIMINATOR = (signal.SIGINT, signal.SIGTERM), srgan.Discriminator
LONG = TINY | {"pretrain_steps": 4, "steps": 5, "save_steps": 1000, "sample_steps": 1}  # reports every update, saves rarely
pytestmark = pytest.mark.usefixtures("tiny_run", "small")  # that run is as users have it


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory):
    """A run like that one, of a small discriminator."""
    run(store, folder := tmp_path_factory.mktemp("finished") / "run", TINY | {"scale": 4})
    return folder


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    """The run that was never stopped."""
    run(store, folder := tmp_path_factory.mktemp("whole") / "run", LONG)
    return folder


def run(store, folder, changes=None, **options):
    return list(srgan.train(store, folder, None, changes, **options))


def run_until(store, folder, at, changes=LONG, **options):
    """Leave the loop at that update."""
    for event in srgan.train(store, folder, None, changes, **options):
        if event.step >= at:
            break


def history(folder):
    return rows((folder / "history.csv").read_text())


def newest(folder):
    return srgan.newest_checkpoint(folder / "ckpt")


def recorded(folder):
    return json.loads((folder / "config.json").read_text())["config"]


def assert_same_run(a, b):
    """Weights, statistics, moments, moving average, exported files, config, history: all but `seconds`."""
    one, other = ({name: value for name, value in final_state(folder).items() if "/" not in name}
                  | plain(newest(folder) | {"seconds": 0, "history": "", "place": ""}) for folder in (a, b))
    assert [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)] == []


def test_a_run_leaves_what_it_promises(tiny_run, store):
    updates, samples = history(tiny_run), sorted((tiny_run / "samples").iterdir())
    assert [path.name for path in samples] == ["update-0000003.png", "update-0000006.png"]
    assert srgan.load_image(samples[0]).std() > 0.05
    assert list(updates[0])[0] == "step" and [int(row["step"]) for row in updates] == [1, 2, 3, 4, 5, 6]
    assert [row["stage"] for row in updates] == ["pretrain"] * 3 + ["adversarial"] * 3
    assert all(row["d_loss"] == "" for row in updates[:3]) and all(float(row["d_loss"]) > 0 for row in updates[3:])
    assert all(float(row["g_loss"]) > 0 and float(row["pixel"]) > 0 for row in updates)
    record = json.loads((tiny_run / "config.json").read_text())
    assert record["store"] == store.fingerprint and "torch" in record["environment"]
    assert {"pretrain_steps": 3, "steps": 3, "decay_steps": 3, "precision": "fp32"}.items() <= record["config"].items()
    for name, done in (("pretrained", 3), ("generator", 6)):
        generator, _, about = srgan.load_generator(tiny_run / f"{name}.safetensors", scale=4)
        assert about["update"] == done and about["data"]["fingerprint"] == store.fingerprint and about["seconds"] >= 0
    assert not changed(generator.state_dict(), newest(tiny_run)["ema"])  # the one to use is the average


def test_the_same_seed_gives_the_same_run_whatever_the_callers_random_numbers_and_says_when_it_is_done(store, tmp_path, finished):
    torch.manual_seed(5)
    events = run(store, tmp_path / "r", TINY | {"scale": 4})
    assert_same_run(tmp_path / "r", finished)
    assert [event.step for event in events] == sorted({event.step for event in events}) and events[-1].step == 6
    assert [event.done for event in events] == [False] * (len(events) - 1) + [True] and not events[-1].stopped
    assert {event.total for event in events} == {6} and events[-1].checkpoint.startswith("update 6, ")
    assert [event.sample.name for event in events if event.sample] == ["update-0000003.png", "update-0000006.png"]
    run(store, tmp_path / "other", TINY | {"scale": 4, "seed": 1})
    assert len(changed(newest(tmp_path / "other")["generator"], newest(finished)["generator"])) > 3


def stop_in_the_loop(store, folder, at):
    """Ctrl-C or a notebook's stop button, or (at 2) as cluster schedulers stop: the next update is the last."""
    for event in srgan.train(store, folder, "sharp", LONG):
        if event.step == at - 1:
            signal.raise_signal(signal.SIGTERM if at == 2 else signal.SIGINT)
    assert event.done and event.stopped and event.notes[-1].startswith(f"stopped at update {at} of 9; saved")


def stop_in_an_update(store, folder, at):
    """Ctrl-C in the middle of an update: it is finished first."""
    draw, calls = srgan.batch, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(srgan, "batch", lambda *given: calls.append(given) or (
            len(calls) == at and signal.raise_signal(signal.SIGINT)) or draw(*given))
        event = run(store, folder, LONG)[-1]
    assert event.stopped and event.done and event.step == len(calls) == at


def stop_by_time(store, folder, at):
    """A deadline long past: one update, and again until there are enough."""
    for _ in range(at):
        event = run(store, folder, LONG, max_minutes=1e-9)[-1]
        assert event.done and event.stopped and "run it again to continue" in event.notes[-1]


def stop_by_two_interrupts(store, folder, at):
    """The second one does not wait."""
    run_until(store, folder, at)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(srgan, "batch", lambda *_: [signal.raise_signal(signal.SIGINT) for _ in "12"])
        run(store, folder)


def stop_by_a_power_failure(store, folder, at):
    """After updates that no checkpoint holds: history has no step twice."""
    run_until(store, folder, at)
    kept = shutil.copytree(folder / "ckpt", folder.parent / "ckpt")
    run_until(store, folder, at + 4)
    shutil.rmtree(folder / "ckpt")
    kept.rename(folder / "ckpt")


@pytest.mark.parametrize("stop, at", [
    (run_until, 2), (run_until, 4), (run_until, 6), (stop_in_the_loop, 2), (stop_in_the_loop, 4), (stop_in_an_update, 4),
    (stop_in_an_update, 6), (stop_by_time, 5), (stop_by_two_interrupts, 3), (stop_by_a_power_failure, 3)])
def test_a_stopped_run_ends_like_one_never_stopped(store, tmp_path, whole, stop, at):
    """In pre-training, at the change of stage and after it."""
    handlers = [signal.getsignal(kind) for kind in SIGNALS]
    stop(store, tmp_path / "r", at)
    assert [signal.getsignal(kind) for kind in SIGNALS] == handlers
    assert newest(tmp_path / "r")["update"] == at and (tmp_path / "r" / "generator.safetensors").exists()
    events = run(store, tmp_path / "r")
    assert events[0].notes == [f"continues at update {at} of 9"] and events[-1].step == 9
    assert_same_run(tmp_path / "r", whole)


def test_batch_norm_and_the_whole_discriminator_go_on_where_they_were(store, tmp_path, monkeypatch):
    """Without a moving average, what is drawn is the network that is trained: it goes on learning after the change of stage."""
    monkeypatch.setattr(srgan, "Discriminator", WHOLE_DISCRIMINATOR)  # which has states besides its weights
    changes = LONG | {"ema": 0.0, "batch_norm": 0.1}
    run(store, tmp_path / "whole", changes)
    for at in (4, 6):
        run_until(store, tmp_path / "cut", at, changes)
    run(store, tmp_path / "cut")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert newest(tmp_path / "whole")["generator"]["merge.1.num_batches_tracked"] == 9


@pytest.mark.parametrize("changes, expected", [({"save_steps": 2}, [2, 3, 4, 6, 8]), ({"save_minutes": 0.5}, [3, 5, 7, 8])])
def test_checkpoints_come_every_so_often(store, tmp_path, monkeypatch, changes, expected):
    """Every second update, or when half a minute has gone by; at the change of stage, at the end."""
    seen, clock = [], [0.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    for event in srgan.train(store, tmp_path / "r", "sharp", LONG | {"pretrain_steps": 3} | changes):
        seen.append(event.checkpoint.split(",")[0])
        clock[0] += 20
    assert list(dict.fromkeys(seen)) == ["none yet", *(f"update {update}" for update in expected)]


def test_raising_steps_continues_at_the_final_learning_rate(store, tmp_path, finished):
    """And halfway, they give what they give without a stop. A finished run is done at once."""
    before = history(shutil.copytree(finished, tmp_path / "r"))
    assert [(event.step, event.done, event.stopped) for event in run(store, tmp_path / "r")] == [(6, True, False)]
    assert run(store, tmp_path / "r", {"steps": 6})[-1].step == 9
    after = history(tmp_path / "r")
    assert after[:6] == before and [int(row["step"]) for row in after] == list(range(1, 10))
    assert [float(row["learning_rate"]) for row in after[6:]] == pytest.approx([2e-6] * 3, rel=1e-3)
    assert recorded(tmp_path / "r")["steps"] == 6 and recorded(tmp_path / "r")["decay_steps"] == 3
    for name, stops in (("straight", [4]), ("stopped", [4, 5, 7, 10])):
        for stop in stops:
            run_until(store, tmp_path / name, stop, TINY | {"sample_steps": 1} | ({"steps": 8} if stop > 4 else {}))
        run(store, tmp_path / name, {"steps": 8})
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_another_value_is_another_run(store, finished):
    """Refused with the field and both values, and nothing is touched; the same values are the same run. (More: command line.)"""
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    for field, old, new in (("hr_size", 32, 64), ("batch_size", 2, 3), ("learning_rate", 0.0002, 0.0003),
                            ("pretrain_steps", 3, 4), ("content", "pixel", "vgg"), ("decay_steps", 3, 99), ("decay_steps", 3, 2)):
        with pytest.raises(ValueError, match=rf"{field}={old}, not {new}\b"):
            run(store, finished, {field: new})
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    assert run(store, finished, TINY | {"scale": 4, "save_steps": 7, "sample_steps": 9})[-1].done


def test_a_run_is_what_its_checkpoints_say_and_none_starts_on_top_of_lost_ones(store, tmp_path, finished, monkeypatch):
    shutil.copytree(finished, folder := tmp_path / "r")
    run(store, folder)
    config = (folder / "config.json").read_bytes()
    for broken in (b"", b"{", config.replace(b'"seed": 0', b'"seed": 5')):  # it is taken from the checkpoint
        (folder / "config.json").write_bytes(broken)
        with pytest.raises(ValueError, match="seed=0, not 1"):
            run(store, folder, {"seed": 1})
        assert run(store, folder)[-1].step == 6 and (folder / "config.json").read_bytes() == config
    for other in ({"generator": {}}, {"discriminator": None}, {"g_optimizer": {}}, {"ema": [1]}):
        torch.save(newest(folder) | {"update": 7} | other, path := folder / "ckpt" / "update-00000007.pt")
        with refused(ValueError, "00007.pt does not hold the networks of this run"):
            run(store, folder, {"steps": 9})
        path.unlink()
    with monkeypatch.context() as patch:  # no fault of the checkpoint, nor an empty Drive
        patch.setattr(srgan.TrainState, "load", mock.Mock(side_effect=torch.OutOfMemoryError("out of memory")))
        with refused(torch.OutOfMemoryError, "out of memory"):
            run(store, folder, {"steps": 9})
        patch.setattr(os, "listdir", mock.Mock(side_effect=OSError("Input/output error")))
        with refused(OSError, "Input/output error"):
            list(srgan.train(store, tmp_path / "new", "sharp", TINY, backup=folder))
    for path in (folder / "ckpt").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):  # also when nothing else is left
        with pytest.raises(ValueError, match="no checkpoint verifies.*update-00000006.pt"):
            run(store, folder, TINY)
        (folder / "config.json").unlink(missing_ok=True)


@pytest.mark.parametrize("name, loss, at", [("pretrain_step", "g_loss", 3), ("discriminator_step", "d_loss", 6),
                                            ("generator_step", "g_loss", 5)])
def test_a_loss_that_is_not_finite_stops_the_run(store, tmp_path, monkeypatch, name, loss, at):
    """With the update and the loss; the last good checkpoint is there."""
    step = getattr(srgan, name)
    monkeypatch.setattr(srgan, name, lambda state, *args: step(state, *args) | (
        {loss: torch.tensor(math.inf)} if state.update + 1 == at else {}))
    with pytest.raises(FloatingPointError, match=rf"update {at}\b.*{loss} is not finite"):
        run(store, tmp_path / "r", LONG | {"save_steps": 2})
    assert newest(tmp_path / "r")["update"] == (at - 1) // 2 * 2
    assert [int(row["step"]) for row in history(tmp_path / "r")] == list(range(1, at))


def test_run_name(store):
    """Another field, another name; a longer run keeps its own."""
    name = srgan.run_name(srgan.Config(), store)
    for free in ({"steps": 99}, {"save_steps": 7}, {"precision": "fp32"}):
        assert srgan.run_name(srgan.Config(**free), store) == name and name.startswith("sharp-x4-")
    others = [{"scale": 8}, {"seed": 1}, {"content": "pixel"}, {"learning_rate": 3e-4}, {"pretrain_steps": 5}]
    configs = [srgan.Config(**other) for other in others] + [srgan.Config.preset("demo")]
    assert len({name, *(srgan.run_name(config, store) for config in configs)}) == 7


@pytest.fixture
def paced(monkeypatch):
    """A clock by hand: 1 s for an update of pre-training, 3 s for an adversarial one, neither of which does anything."""
    clock = [0.0]

    def timed(state, *_):
        clock[0] += 1 if state.update < state.config.pretrain_steps else 3
        state.update += 1
        return {"g_loss": torch.tensor(0.5)}

    monkeypatch.setattr(srgan, "_one_update", timed)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])


@pytest.mark.parametrize("steps", [200, 0])
def test_for_minutes_sets_a_length_once(store, tmp_path, paced, steps):
    """In proportion to the preset's stages: nearly all of 50 minutes, and no more. From then on it is data."""
    changes = TINY | {"pretrain_steps": 400, "steps": steps}
    told = srgan.forecast(store, tmp_path / "r", "sharp", changes, for_minutes=50)
    assert "starts a new run" in told and "50 min" in told and not (tmp_path / "r").exists()
    run_until(store, tmp_path / "r", 1, changes, for_minutes=50)
    found = recorded(tmp_path / "r")
    assert 0.9 * 3000 <= found["pretrain_steps"] + 3 * found["steps"] <= 3000 and found["decay_steps"] == found["steps"]
    assert abs(found["pretrain_steps"] - 2 * found["steps"]) <= 2 if steps else found["steps"] == 0
    notes = run(store, tmp_path / "r", for_minutes=5, max_minutes=1e-9)[0].notes
    assert any("keeps its own length" in note for note in notes) and recorded(tmp_path / "r") == found


def test_the_forecast_adds_up_and_warns(store, tmp_path, finished, paced, monkeypatch):
    """For a new run, one that time cuts, one that a fresh machine continues, one that is finished."""
    r, b, changes = tmp_path / "r", tmp_path / "b", TINY | {"pretrain_steps": 300, "steps": 100}

    def told(changes=changes, preset="sharp", **options):
        return srgan.forecast(store, r, preset, changes, **options)

    assert all(word in told() for word in ("starts a new run", "400 updates", "about 10 min on this"))
    assert "WARNING" not in told() + told(TINY, max_minutes=0.3) and not r.exists()  # 12 s
    assert "WARNING: 5 min do not suffice" in told(max_minutes=5) and "about 50 %" in told(max_minutes=5.2)
    changes = TINY | {"steps": 103}
    run_until(store, r, 3, changes, backup=b)
    shutil.rmtree(r)
    assert all(word in told(changes, backup=b) for word in ("continues at update 3", "106", "about 5.4 min"))  # 103 of 3 s
    with pytest.raises(ValueError, match="scale=4, not 8"):
        told({"scale": 8}, backup=b)
    assert srgan.forecast(store, finished) == "finished: all 6 updates are done; more minutes, or more steps, train on"
    monkeypatch.setattr(srgan, "in_colab", lambda: True)
    hours = TINY | {"pretrain_steps": 0, "steps": 14_401}  # 12 h and 3 s
    assert "12 h at most: without Drive all is lost" in told(hours)
    assert "12 h at most: run it again then" in told(hours, backup=tmp_path / "c")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert told(TINY, backup=tmp_path / "c").count("free and needs") == 2  # here, and the backup's


def test_a_finished_run_can_be_made_longer_by_minutes(store, finished, tmp_path, paced):
    """Only when it is finished: a cut in between does not lengthen it again. Its learning rate rises, and falls anew."""
    shutil.copytree(finished, r := tmp_path / "r")
    changes = srgan.longer(store, r, 0.2)
    assert changes == {"steps": 3 + 4, "decay_steps": 3 + 4} and srgan.longer(store, tmp_path / "new", 1) == {}  # 12 s of 3 s
    run_until(store, r, 7, {"scale": 4} | changes)
    assert srgan.longer(store, r, 0.2) == changes and run(store, r, {"scale": 4})[-1].step == 10
    assert srgan.longer(store, r, 0.2)["steps"] == 3 + 8
    rates = [float(row["learning_rate"]) for row in history(r)][3:]  # of the adversarial updates
    assert rates[2] < rates[3] and rates[3:] == sorted(rates[3:], reverse=True)


def test_precision_follows_the_device(monkeypatch):
    """A T4 (7.5) only emulates bf16, whatever `is_bf16_supported` says; a CPU may have it."""
    machines = [("cuda", (6, 1)), ("cuda", (7, 5)), ("cuda", (8, 0)), ("cuda", (9, 0)), ("cpu", True), ("cpu", False)]
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    for asked, expected in (("auto", "fp16 fp16 bf16 bf16 bf16 fp32"), ("bf16", "fp16 fp16 bf16 bf16 bf16 fp32"),
                            ("fp16", "fp16 fp16 fp16 fp16 bf16 fp32"), ("fp32", "fp32 fp32 fp32 fp32 fp32 fp32")):
        for (kind, ability), precision in zip(machines, expected.split(), strict=True):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, ability=ability: ability)
            for unit in ("avx512_bf16", "amx_tile"):
                monkeypatch.setattr(torch.cpu, f"_is_{unit}_supported", lambda ability=ability: ability, raising=False)
            assert srgan._resolve_precision(asked, torch.device(kind)) == precision, (asked, kind, ability)


@pytest.mark.parametrize("before, after", [("bf16", "bf16"), ("bf16", "fp16"), ("fp16", "fp32")])
def test_precision_is_resolved_once_and_changes_only_with_the_device(store, tmp_path, monkeypatch, before, after):
    """As from an A100 to a T4, whose loss scaler then starts anew; and back."""
    asked = []
    for precision, changes in ((before, TINY | {"steps": 1, "pretrain_steps": 1, "precision": "auto"}), (after, {"steps": 2})):
        monkeypatch.setattr(srgan, "_resolve_precision", lambda asks, _, precision=precision: asked.append(asks) or precision)
        event = run(store, tmp_path / "r", changes)[-1]
        assert recorded(tmp_path / "r")["precision"] == precision
    assert event.step == 3 and asked[0] == "auto" and asked[-1] == before


@pytest.mark.parametrize("changes", [{}, {"content": "vgg", "vgg": "random", "adversarial": "bce"}], ids=str)
def test_bf16_runs_on_a_cpu(store, tmp_path, monkeypatch, changes):
    """Networks in bf16, weights, images and losses in fp32."""
    monkeypatch.setattr(srgan, "_resolve_precision", lambda *_: "bf16")
    run(store, tmp_path / "r", TINY | changes)
    assert {value.dtype for value in newest(tmp_path / "r")["generator"].values()} == {torch.float32}
    assert all(math.isfinite(float(row["g_loss"])) for row in history(tmp_path / "r"))
    state, (lr, hr) = tiny_state(precision="bf16", pretrain_steps=0, **changes), images()
    with state.autocast():
        sr = state.generator(lr)
        assert state.generator.merge(state.generator.head(lr)).dtype == torch.bfloat16
    losses = srgan.discriminator_step(state, lr, sr, hr) | srgan.generator_step(state, lr, sr, hr)
    assert sr.dtype == torch.float32 and {loss.dtype for loss in losses.values()} == {torch.float32}


@pytest.mark.parametrize("copied", [False, True], ids=["on this machine", "on a fresh one from Drive"])
def test_the_report_is_reproduced_and_goes_on_where_it_was_stopped(store, tmp_path, copied):
    changes = {"scale": 2, "hr_size": 48, "channels": 4, "residual_blocks": 1, "content": "pixel", "vgg": "random",
               "batch_size": 17, "epochs": 1.0}
    folder, drive = tmp_path / "here", tmp_path / "drive" if copied else None
    again = functools.partial(srgan.reproduce_report, store, folder, changes, (1, 9), drive)
    events = again()
    assert next(events).step == 1 and next(events).step == 2  # 34 faces in two batches
    events.close()
    for event in again():
        if event.total != 2 and not event.done:  # in its second half, too
            signal.raise_signal(signal.SIGINT)
    assert event.stopped and event.step < event.total and not (folder / "stages.txt").exists()
    if copied:
        shutil.rmtree(folder)  # the session is cut off
    *_, last = again()
    assert last.done and last.step == event.total
    kept = list((drive or folder).glob("report-*"))
    assert sorted(path.name for path in kept) == ["report-000001.safetensors", "report-000002.safetensors"]
    generator, config, _ = srgan.load_generator(max(kept))
    assert [srgan.load_generator(path)[2]["update"] for path in sorted(kept)] == [1, 2]
    rows = srgan.evaluate(generator, config, store, store.indices("test"))
    table, told = srgan.results_table(srgan.summarise(rows, config, "test")), (folder / "stages.txt").read_text()
    assert table in told and "report, 1 updates" in told and "sharp, " in told and (folder / "stages.png").exists()
    sharp = srgan.load_generator(folder / "sharp-000002" / "generator.safetensors")[1]
    assert (sharp.preset_name, sharp.scale, sharp.crop, sharp.hr_size) == ("sharp", 2, 144, 48)  # the report's view
    with pytest.raises(ValueError, match="started with channels=4, not 8"):
        list(srgan.reproduce_report(store, folder, changes | {"channels": 8, "epochs": 2.0}, backup=drive))
