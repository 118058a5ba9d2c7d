"""The step functions by hand, and runs that are stopped, continued, changed, forecast and broken."""

import csv
import json
import math
import shutil
import signal
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from test_kill import final_state, plain

import srgan_utils as srgan

CPU, SIGNALS = torch.device("cpu"), (signal.SIGINT, signal.SIGTERM)
REPORT = {"hr_size": 32, "channels": 8, "residual_blocks": 1, "batch_size": 2, "precision": "fp32", "content": "pixel"}
LONG = TINY | {"pretrain_steps": 4, "steps": 5, "save_steps": 1000, "sample_steps": 1}  # reports every update, saves rarely


@pytest.fixture(scope="module", autouse=True)
def plain_samples(tiny_run):
    """But for that run's, they are no pictures: drawing takes longer than the updates."""
    with pytest.MonkeyPatch.context() as patch:
        figure = SimpleNamespace(savefig=lambda path, **_: Path(path).write_bytes(b""))
        patch.setattr(srgan, "stages_figure", lambda *_, **__: figure)
        yield


def tiny_state(preset="sharp", **changes):
    config = srgan.Config.preset(preset, **((TINY if preset == "sharp" else REPORT) | changes)).for_faces(8)
    return srgan.TrainState(config, CPU)


def images():
    hr = srgan.quantise(srgan.bicubic(torch.cat([srgan.synthetic_face(index) for index in (0, 1)]), 32))
    return srgan.quantise(srgan.bicubic(hr, 8)), hr


def update(state, store):
    return srgan._one_update(state, *srgan.batch(store, state.config, state.update, CPU))


def run(store, folder, preset=None, changes=None, **options):
    return list(srgan.train(store, folder, preset, changes, **options))


def run_until(at, store, folder, changes=None, **options):
    for event in srgan.train(store, folder, None, changes, **options):
        if event.step >= at:
            break


def history(folder):
    with open(folder / "history.csv", newline="") as file:
        return list(csv.DictReader(file))


def newest(folder):
    return srgan.newest_checkpoint(folder / "ckpt")


def recorded(folder):
    return json.loads((folder / "config.json").read_text())["config"]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed(a, b):
    """The names of the tensors that differ."""
    return {name for name in a.keys() | b.keys() if not torch.equal(a[name], b[name])}


def assert_same_run(a, b):
    """Weights, statistics, moments, moving average, exported files, config, history: all but `seconds`."""
    one, other = ({name: value for name, value in final_state(folder).items() if "/" not in name}
                  | plain(newest(folder) | {"seconds": 0, "history": "", "place": ""}) for folder in (a, b))
    assert [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)] == []


# --- One step


@pytest.mark.parametrize("preset", ["sharp", "report"])
def test_pretraining_lowers_the_loss(preset):
    """Repeated on one batch; the loss is the pixel loss of the network that was."""
    state = tiny_state(preset, pretrain_learning_rate=2e-3, pretrain_steps=100, warmup_steps=0, decay="none")
    lr, hr = images()
    first = srgan.pixel_loss(deepcopy(state.generator)(lr), hr).item()
    losses = [srgan.pretrain_step(state, lr, hr)["pixel"].item() for _ in range(15)]
    assert losses[0] == pytest.approx(first) and losses[-1] < 0.8 * first


def weights(network):
    return {name: value.clone() for name, value in network.named_parameters()}


def test_each_step_moves_its_own_network():
    """Neither weights nor gradients of the other, while D's step sees sr of a graph that reaches into G."""
    state, (lr, hr) = tiny_state(pretrain_steps=0), images()
    generator, discriminator, sr = state.generator, state.discriminator, state.generator(lr)
    before = weights(generator), weights(discriminator)
    srgan.discriminator_step(state, sr, hr)
    assert not changed(weights(generator), before[0]) and all(p.grad is None for p in generator.parameters())
    assert changed(weights(discriminator), before[1]) == before[1].keys()
    middle, gradients = weights(discriminator), {name: p.grad.clone() for name, p in discriminator.named_parameters()}
    srgan.generator_step(state, sr, hr)
    assert not changed(weights(discriminator), middle) and changed(weights(generator), before[0]) == before[0].keys()
    assert not changed({name: p.grad for name, p in discriminator.named_parameters()}, gradients)
    assert all(p.requires_grad for p in discriminator.parameters())


@pytest.mark.parametrize("preset, changes", [
    ("sharp", {}), ("sharp", {"adversarial": "bce"}), ("sharp", {"content": "vgg", "vgg": "random"}), ("report", {})])
def test_every_generator_weight_gets_a_gradient(preset, changes):
    """From content and adversarial loss together, and from the adversarial alone."""
    for only in ({}, {"content_weight": 0.0, "pixel_weight": 0.0}):
        state, (lr, hr) = tiny_state(preset, pretrain_steps=0, **changes, **only), images()
        assert srgan.generator_step(state, state.generator(lr), hr)["content"] > 0
        for name, p in state.generator.named_parameters():
            assert p.grad is not None and p.grad.abs().max() > 0, name


@pytest.mark.parametrize("done, share", [(3, 1 / 4), (4, 2 / 4), (6, 1.0), (9, 1.0)])
def test_generator_loss_by_hand(done, share):
    """content_weight content + pixel_weight pixel + the ramp's share of adversarial_weight adversarial."""
    state, (lr, hr) = tiny_state(ramp_steps=4, adversarial_weight=0.5, content_weight=2.0, pixel_weight=3.0), images()
    state.update = done
    losses = srgan.generator_step(state, state.generator(lr), hr)
    expected = 2 * losses["content"] + 3 * losses["pixel"] + share * 0.5 * losses["adversarial"]
    torch.testing.assert_close(losses["g_loss"], expected)
    assert min(losses[name].item() for name in ("content", "pixel", "adversarial")) > 1e-3


# --- Moving average and schedule


def test_moving_average_by_hand():
    """0.9 of the old and 0.1 of the new, BatchNorm's statistics included, its counter copied."""
    ema, generator = (tiny_state("report", seed=seed).generator for seed in (1, 2))
    generator.train()(torch.rand(2, 3, 8, 8))
    before, new = deepcopy(ema.state_dict()), generator.state_dict()
    srgan._update_ema(ema, generator, 0.9)
    for name, value in ema.state_dict().items():
        expected = 0.9 * before[name] + 0.1 * new[name] if value.is_floating_point() else new[name]
        torch.testing.assert_close(value, expected)
    assert not torch.allclose(new["merge.1.running_mean"], before["merge.1.running_mean"])


def test_moving_average_of_a_run(store):
    """Update k (from 0) keeps min(ema, (1 + k) / (10 + k)) of the old: the first takes nine tenths of the new."""
    state = tiny_state(ema=0.15)
    expected = deepcopy(dict(state.generator.state_dict()))
    for keep in (0.1, 0.15, 0.15):
        update(state, store)
        expected = {name: keep * expected[name] + (1 - keep) * value for name, value in state.generator.state_dict().items()}
        torch.testing.assert_close(dict(state.ema.state_dict()), expected)
    assert state.best is state.ema and not any(p.requires_grad for p in state.ema.parameters())


def test_learning_rate_by_hand(store):
    """Each stage warms up, then falls to a hundredth along a cosine; past its planned end it stays there."""
    config = srgan.Config(learning_rate=1e-3, pretrain_learning_rate=1e-2, warmup_steps=4, pretrain_steps=100, steps=50,
                          decay_steps=50)

    def cosine(base, done):
        return base * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)

    expected = {0: 1e-2 / 4, 1: cosine(1e-2, 0.01) / 2, 3: cosine(1e-2, 0.03), 50: 1e-2 * 0.505, 99: cosine(1e-2, 0.99),
                100: 1e-3 / 4, 103: cosine(1e-3, 0.06), 125: 1e-3 * 0.505, 149: cosine(1e-3, 0.98), 150: 1e-5, 1000: 1e-5}
    assert {done: srgan._learning_rate(config, done) for done in expected} == pytest.approx(expected)
    constant = replace(config, decay="none", warmup_steps=0)
    assert [srgan._learning_rate(constant, done) for done in (0, 50, 99, 100, 500)] == [1e-2] * 3 + [1e-3] * 2
    state = tiny_state()  # and it reaches the optimisers
    for done in range(5):
        update(state, store)
        assert state.g_optimizer.param_groups[0]["lr"] == pytest.approx(srgan._learning_rate(state.config, done))
    assert state.d_optimizer.param_groups[0]["lr"] == pytest.approx(srgan._learning_rate(state.config, 4))
    assert state.g_optimizer.param_groups[0]["betas"] == (state.config.beta1, state.config.beta2)


# --- A whole run


def test_a_run_leaves_what_it_promises_and_tells_how_it_goes(tiny_run, store, tmp_path):
    events, rows = run(store, tmp_path / "r", "sharp", TINY | {"scale": 4}), history(tiny_run)
    assert_same_run(tmp_path / "r", tiny_run)  # the same seed
    assert [event.step for event in events] == sorted({event.step for event in events}) and events[-1].step == 6
    assert [event.done for event in events] == [False] * (len(events) - 1) + [True] and not events[-1].stopped
    assert {event.total for event in events} == {6} and events[-1].checkpoint.startswith("update 6, ")
    assert {event.stage for event in events if event.step <= 3} == {"pretrain"} and not events[-1].backup
    assert all(event.images_per_second > 0 and event.seconds_left >= 0 for event in events)
    assert {"g_loss", "pixel"} <= events[0].losses.keys() and "d_loss" in events[-1].losses
    samples = [event.sample.name for event in events if event.sample]
    assert samples == sorted(path.name for path in (tiny_run / "samples").iterdir())
    assert samples == ["update-0000003.png", "update-0000006.png"]
    assert srgan.load_image(tiny_run / "samples" / samples[0]).std() > 0.05
    assert list(rows[0])[0] == "step" and [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["stage"] for row in rows] == ["pretrain"] * 3 + ["adversarial"] * 3
    assert all(row["d_loss"] == "" for row in rows[:3]) and all(float(row["d_loss"]) > 0 for row in rows[3:])
    assert all(float(row["g_loss"]) > 0 and float(row["pixel"]) > 0 for row in rows)
    record = json.loads((tiny_run / "config.json").read_text())
    assert record["store"] == store.fingerprint and "torch" in record["environment"]
    assert {"pretrain_steps": 3, "steps": 3, "decay_steps": 3, "precision": "fp32"}.items() <= record["config"].items()
    for name, done in (("pretrained", 3), ("generator", 6)):
        generator, _, about = srgan.load_generator(tiny_run / f"{name}.safetensors", scale=4)
        assert about["update"] == done and about["data"]["fingerprint"] == store.fingerprint and about["seconds"] >= 0
    assert not changed(generator.state_dict(), newest(tiny_run)["ema"])  # the one to use is the average


def test_the_same_seed_gives_the_same_run(store, tmp_path):
    """Bit for bit, whatever the caller's own random numbers; another seed another one."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(ord(name))
        run(store, tmp_path / name, "report", REPORT | {"steps": 4, "pretrain_steps": 2, "seed": seed})
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert len(changed(newest(tmp_path / "a")["generator"], newest(tmp_path / "c")["generator"])) > 3


# --- Stopped and continued


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    """The run that was never stopped."""
    run(store, folder := tmp_path_factory.mktemp("whole") / "run", "sharp", LONG)
    return folder


def stop_by_closing(store, folder, at):
    events = srgan.train(store, folder, "sharp", LONG)
    while next(events).step < at:
        pass
    events.close()


def stop_by_leaving(store, folder, at):
    run_until(at, store, folder, LONG)


def stop_by_an_error(store, folder, at):
    with pytest.raises(ZeroDivisionError):
        for event in srgan.train(store, folder, "sharp", LONG):
            1 / (at - event.step)


def stop_in_the_loop(store, folder, at, kind=signal.SIGINT):
    """Ctrl-C, or a notebook's stop button, while the caller shows something: the next update is the last."""
    for event in srgan.train(store, folder, "sharp", LONG):
        if event.step == at - 1:
            signal.raise_signal(kind)
    assert event.done and event.stopped and event.notes[-1].startswith(f"stopped at update {at} of 9; saved")


def stop_politely(store, folder, at):
    """As cluster schedulers and `timeout` do."""
    stop_in_the_loop(store, folder, at, signal.SIGTERM)


def stop_in_an_update(store, folder, at):
    """Ctrl-C in the middle of an update: it is finished first."""
    average, calls = srgan._update_ema, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(srgan, "_update_ema", lambda *args: average(*args) or calls.append(args) or (
            len(calls) == at and signal.raise_signal(signal.SIGINT)))
        event = run(store, folder, "sharp", LONG)[-1]
    assert event.stopped and event.done and event.step == len(calls) == at


def stop_by_time(store, folder, at):
    """A deadline long past: one update, and again until there are enough."""
    for _ in range(at):
        event = run(store, folder, "sharp", LONG, max_minutes=1e-9)[-1]
        assert event.done and event.stopped and "run it again to continue" in event.notes[-1]


@pytest.mark.parametrize("stop, at", [
    *((stop, at) for stop in (stop_by_closing, stop_in_an_update) for at in (2, 4, 6)), (stop_by_leaving, 6),
    (stop_by_an_error, 2), (stop_in_the_loop, 4), (stop_in_the_loop, 6), (stop_politely, 2), (stop_by_time, 5)])
def test_a_stopped_run_ends_like_one_never_stopped(store, tmp_path, whole, stop, at):
    """In pre-training, at the change of stage and after it."""
    handlers = [signal.getsignal(kind) for kind in SIGNALS]
    stop(store, tmp_path / "r", at)
    assert [signal.getsignal(kind) for kind in SIGNALS] == handlers
    assert newest(tmp_path / "r")["update"] == at and (tmp_path / "r" / "generator.safetensors").exists()
    events = run(store, tmp_path / "r")
    assert events[0].notes == [f"continues at update {at} of 9"] and events[-1].step == 9
    assert_same_run(tmp_path / "r", whole)


def test_a_second_interrupt_does_not_wait_and_what_was_saved_is_whole(store, tmp_path, whole, monkeypatch):
    stop_by_closing(store, tmp_path / "r", 3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(srgan, "_update_ema", lambda *_: [signal.raise_signal(signal.SIGINT) for _ in "12"])
        run(store, tmp_path / "r")
    assert newest(tmp_path / "r")["update"] == 3 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run(store, tmp_path / "r")
    assert_same_run(tmp_path / "r", whole)


def test_batch_norm_goes_on_learning_after_the_change_of_stage(store, tmp_path):
    """Without a moving average, what is drawn then is the network that is trained."""
    changes = LONG | {"ema": 0.0, "batch_norm": 0.1}
    run(store, tmp_path / "whole", "sharp", changes)
    run_until(4, store, tmp_path / "cut", changes)
    run(store, tmp_path / "cut")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert newest(tmp_path / "whole")["generator"]["merge.1.num_batches_tracked"] == 9


def test_a_run_that_died_ends_like_one_that_did_not(store, tmp_path, whole):
    """The power fails after updates that no checkpoint holds: history has no step twice."""
    stop_by_closing(store, tmp_path / "r", 3)
    shutil.copytree(tmp_path / "r" / "ckpt", tmp_path / "ckpt")
    stop_by_closing(store, tmp_path / "r", 7)
    shutil.rmtree(tmp_path / "r" / "ckpt")
    (tmp_path / "ckpt").rename(tmp_path / "r" / "ckpt")
    run(store, tmp_path / "r")
    assert_same_run(tmp_path / "r", whole)


@pytest.mark.parametrize("changes, expected", [({"save_steps": 2}, [2, 3, 4, 6, 8]), ({"save_minutes": 0.01}, [3, 8])])
def test_checkpoints_come_every_so_often(store, tmp_path, changes, expected):
    """Every second update, at the change of stage, at the end; or by the clock too."""
    seen, is_by_clock = [], "save_minutes" in changes
    for event in srgan.train(store, tmp_path / "r", "sharp", LONG | {"pretrain_steps": 3} | changes):
        seen.append(event.checkpoint.split(",")[0])
        time.sleep(0.25 * is_by_clock)
    found = [int(each.removeprefix("update ")) for each in dict.fromkeys(seen) if each != "none yet"]
    assert set(expected) < set(found) if is_by_clock else found == expected


def test_raising_steps_continues_at_the_final_learning_rate(store, tmp_path, tiny_run):
    """And halfway, they give what they give without a stop. A finished run is done at once."""
    shutil.copytree(tiny_run, tmp_path / "r")
    before = history(tmp_path / "r")
    assert [(event.step, event.done, event.stopped) for event in run(store, tmp_path / "r")] == [(6, True, False)]
    assert_same_run(tmp_path / "r", tiny_run)
    assert run(store, tmp_path / "r", changes={"steps": 6})[-1].step == 9
    rows = history(tmp_path / "r")
    assert rows[:6] == before and [int(row["step"]) for row in rows] == list(range(1, 10))
    assert [float(row["learning_rate"]) for row in rows[6:]] == pytest.approx([1e-6] * 3, rel=1e-3)
    assert recorded(tmp_path / "r")["steps"] == 6 and recorded(tmp_path / "r")["decay_steps"] == 3
    for name, stops in (("straight", [4]), ("stopped", [4, 5, 7, 10])):
        for stop in stops:
            run_until(stop, store, tmp_path / name, TINY | {"sample_steps": 1} | ({"steps": 8} if stop > 4 else {}))
        run(store, tmp_path / name, None, {"steps": 8})
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


# --- Another run, and broken ones


def test_another_value_is_another_run(store, tiny_run):
    """Refused with the field and both values, and nothing is touched; the same values are the same run."""
    before = contents(tiny_run)
    for field, old, new in (
            ("scale", 4, 8), ("seed", 0, 9), ("batch_size", 2, 3), ("learning_rate", 0.0001, 0.0002), ("pretrain_steps", 3, 4),
            ("content", "features", "pixel"), ("decay_steps", 3, 99), ("decay_steps", 3, 2), ("preset_name", "sharp", "demo")):
        with pytest.raises(ValueError, match=rf"{field}={old}, not {new}\b"):
            run(store, tiny_run, *([new] if field == "preset_name" else [None, {field: new}]))
    assert contents(tiny_run) == before
    assert run(store, tiny_run, "sharp", TINY | {"scale": 4, "save_steps": 7, "sample_steps": 9})[-1].done


def test_no_run_starts_on_other_faces_or_on_top_of_lost_checkpoints(store, tmp_path, tiny_run):
    shutil.copytree(tiny_run, folder := tmp_path / "r")
    run(store, folder)
    config = (folder / "config.json").read_bytes()
    with pytest.raises(ValueError, match="other faces"):
        run(srgan.prepare("synthetic", tmp_path / "store", limit=17), folder)
    for broken in (b"", b"{", config.replace(b'"seed": 0', b'"seed": 5')):  # it is taken from the checkpoint
        (folder / "config.json").write_bytes(broken)
        with pytest.raises(ValueError, match="seed=0, not 1"):
            run(store, folder, changes={"seed": 1})
        assert run(store, folder)[-1].step == 6 and (folder / "config.json").read_bytes() == config
    for other in ({"generator": {}}, {"discriminator": None}, {"g_optimizer": {}}, {"ema": [1]}):
        path = srgan.save_checkpoint(folder / "ckpt", newest(folder) | {"update": 7} | other)
        with pytest.raises(ValueError, match="00007.pt does not hold the networks of this run") as caught:
            run(store, folder, changes={"steps": 9})
        assert str(caught.value).isprintable()
        path.unlink()
    for path in (folder / "ckpt").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):  # also when nothing else is left
        with pytest.raises(ValueError, match="no checkpoint verifies.*update-00000006.pt"):
            run(store, folder, "sharp", TINY)
        (folder / "config.json").unlink(missing_ok=True)


@pytest.mark.parametrize("name, loss, at", [("pretrain_step", "g_loss", 3), ("discriminator_step", "d_loss", 6),
                                            ("generator_step", "g_loss", 5)])
def test_a_loss_that_is_not_finite_stops_the_run(store, tmp_path, monkeypatch, name, loss, at):
    """With the update and the loss; the last good checkpoint is there, and good."""
    step = getattr(srgan, name)
    monkeypatch.setattr(srgan, name, lambda state, *args: step(state, *args) | (
        {loss: torch.tensor(math.inf)} if state.update + 1 == at else {}))
    with pytest.raises(FloatingPointError, match=rf"update {at}\b.*{loss} is not finite"):
        run(store, tmp_path / "r", "sharp", LONG | {"save_steps": 2})
    assert newest(tmp_path / "r")["update"] == (at - 1) // 2 * 2
    assert [int(row["step"]) for row in history(tmp_path / "r")] == list(range(1, at))
    monkeypatch.setattr(srgan, name, step)
    assert run(store, tmp_path / "r")[-1].step == 9
    assert [int(row["step"]) for row in history(tmp_path / "r")] == list(range(1, 10))


def test_run_name(store):
    """Another field, another name; a longer run keeps its own."""
    name = srgan.run_name(srgan.Config(), store)
    for free in ({"steps": 99}, {"save_steps": 7}, {"precision": "fp32"}):
        assert srgan.run_name(srgan.Config(**free), store) == name and name.startswith("sharp-x4-")
    others = [{"scale": 8}, {"seed": 1}, {"content": "pixel"}, {"learning_rate": 2e-4}, {"pretrain_steps": 5}]
    configs = [srgan.Config(**other) for other in others] + [srgan.Config.preset("demo")]
    assert len({name, *(srgan.run_name(config, store) for config in configs)}) == 7


# --- Length: by minutes, made longer, forecast


@pytest.fixture
def paced(monkeypatch):
    """A clock by hand: 1 s for an update of pre-training, 3 s for an adversarial one."""
    clock, one_update = [0.0], srgan._one_update

    def timed(state, *pair):
        clock[0] += 1 if state.update < state.config.pretrain_steps else 3
        return one_update(state, *pair)

    monkeypatch.setattr(srgan, "_one_update", timed)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])


@pytest.mark.parametrize("steps", [200, 0])
def test_for_minutes_sets_a_length_once(store, tmp_path, paced, steps):
    """In proportion to the preset's stages: nearly all of 50 minutes, and no more. From then on it is data."""
    changes = TINY | {"pretrain_steps": 400, "steps": steps}
    told = srgan.forecast(store, tmp_path / "r", "sharp", changes, for_minutes=50)
    assert "starts a new run" in told and "50 min" in told and not (tmp_path / "r").exists()
    run_until(1, store, tmp_path / "r", changes, for_minutes=50)
    found = recorded(tmp_path / "r")
    assert 0.9 * 3000 <= found["pretrain_steps"] + 3 * found["steps"] <= 3000 and found["decay_steps"] == found["steps"]
    assert abs(found["pretrain_steps"] - 2 * found["steps"]) <= 2 if steps else found["steps"] == 0
    notes = run(store, tmp_path / "r", for_minutes=5, max_minutes=1e-9)[0].notes
    assert any("keeps its own length" in note for note in notes) and recorded(tmp_path / "r") == found


def test_the_forecast_adds_up_and_warns(store, tmp_path, tiny_run, paced, monkeypatch):
    """For a new run, one that time cuts, one that a fresh machine continues, one that is finished."""
    r, b, changes = tmp_path / "r", tmp_path / "b", TINY | {"pretrain_steps": 300, "steps": 100}

    def told(changes=changes, preset="sharp", **options):
        return srgan.forecast(store, r, preset, changes, **options)

    assert all(word in told() for word in ("starts a new run", "400 updates", "about 10 min on this"))
    assert "WARNING" not in told() + told(TINY, max_minutes=0.3) and not r.exists()  # 12 s
    assert "WARNING: 5 min do not suffice" in told(max_minutes=5) and "about 50 %" in told(max_minutes=5.2)
    changes = TINY | {"steps": 103}
    run_until(3, store, r, changes, backup=b)
    shutil.rmtree(r)
    assert all(word in told(changes, backup=b) for word in ("continues at update 3", "106", "about 5.4 min"))  # 103 of 3 s
    with pytest.raises(ValueError, match="scale=4, not 8"):
        told({"scale": 8}, backup=b)
    assert srgan.forecast(store, tiny_run) == "finished: all 6 updates are done; more minutes, or more steps, train on"
    # Adam keeps two moments of each of the report's weights, 138.9 million of them in the discriminator alone
    size = (tiny_run / "ckpt" / "update-00000006.pt").stat().st_size
    for preset, given, expected in (("sharp", changes, size), ("report", {"content": "pixel"}, 12 * 139.8e6)):
        megabytes = told(given, preset, for_minutes=9).split("checkpoints of ")[1].split(" MB")[0].replace(",", "")
        assert float(megabytes) * 1e6 == pytest.approx(expected, rel=0.05)
    monkeypatch.setattr(srgan, "in_colab", lambda: True)
    hours = TINY | {"pretrain_steps": 0, "steps": 14_401}  # 12 h and 3 s
    assert "12 h at most: without Drive all is lost" in told(hours)
    assert "12 h at most: run it again then" in told(hours, backup=tmp_path / "c")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert told(TINY, backup=tmp_path / "c").count("free and needs") == 2  # here, and the backup's


def test_a_finished_run_can_be_made_longer_by_minutes(store, tiny_run, tmp_path, paced):
    """Only when it is finished: a cut in between does not lengthen it again. Its learning rate rises, and falls anew."""
    shutil.copytree(tiny_run, r := tmp_path / "r")
    changes = srgan.longer(store, r, 0.2)
    assert changes == {"steps": 3 + 4, "decay_steps": 3 + 4} and srgan.longer(store, tmp_path / "new", 1) == {}  # 12 s of 3 s
    run_until(7, store, r, {"scale": 4} | changes)
    assert srgan.longer(store, r, 0.2) == changes and run(store, r, "sharp", {"scale": 4})[-1].step == 10
    assert srgan.longer(store, r, 0.2)["steps"] == 3 + 8
    rates = [float(row["learning_rate"]) for row in history(r)][3:]  # of the adversarial updates
    assert rates[2] < rates[3] and rates[3:] == sorted(rates[3:], reverse=True)


# --- Precision


def test_precision_follows_the_device(monkeypatch):
    """A T4 (7.5) only emulates bf16, whatever `is_bf16_supported` says; a CPU may have it."""
    gpu, capability, native = torch.device("cuda"), [], []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability[-1])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    for unit in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{unit}_supported", lambda: native[-1], raising=False)
    for asked, of, expected in (
            ("auto", (7, 5), "fp16"), ("auto", (8, 0), "bf16"), ("auto", (9, 0), "bf16"), ("auto", (6, 1), "fp16"),
            ("bf16", (7, 5), "fp16"), ("bf16", (8, 9), "bf16"), ("fp16", (7, 5), "fp16"), ("fp16", (8, 0), "fp16"),
            ("fp32", (7, 5), "fp32"), ("fp32", (9, 0), "fp32")):
        capability.append(of)
        assert srgan._resolve_precision(asked, gpu) == expected, (asked, of)
    for asked, of, expected in (
            ("auto", True, "bf16"), ("auto", False, "fp32"), ("fp16", True, "bf16"), ("fp16", False, "fp32"),
            ("fp32", True, "fp32"), ("bf16", True, "bf16"), ("bf16", False, "fp32")):
        native.append(of)
        assert srgan._resolve_precision(asked, CPU) == expected, (asked, of)


@pytest.mark.parametrize("before, after", [("bf16", "bf16"), ("bf16", "fp16"), ("fp16", "fp32")])
def test_precision_is_resolved_once_and_changes_only_with_the_device(store, tmp_path, monkeypatch, before, after):
    """As from an A100 to a T4, whose loss scaler then starts anew; and back."""
    asked = []
    for precision, changes in ((before, TINY | {"steps": 1, "pretrain_steps": 1, "precision": "auto"}), (after, {"steps": 2})):
        monkeypatch.setattr(srgan, "_resolve_precision", lambda asks, _, precision=precision: asked.append(asks) or precision)
        event = run(store, tmp_path / "r", None, changes)[-1]
        assert recorded(tmp_path / "r")["precision"] == precision
    assert event.step == 3 and asked[0] == "auto" and asked[-1] == before


@pytest.mark.parametrize("changes", [{}, {"content": "vgg", "vgg": "random"}, {"adversarial": "bce"}])
def test_bf16_runs_on_a_cpu(store, tmp_path, monkeypatch, changes):
    """Networks in bf16, weights, images and losses in fp32."""
    monkeypatch.setattr(srgan, "_resolve_precision", lambda *_: "bf16")
    run(store, tmp_path / "r", "sharp", TINY | changes)
    assert {value.dtype for value in newest(tmp_path / "r")["generator"].values()} == {torch.float32}
    assert all(math.isfinite(float(row["g_loss"])) for row in history(tmp_path / "r"))
    state, (lr, hr) = tiny_state(precision="bf16", pretrain_steps=0, **changes), images()
    with state.autocast():
        sr = state.generator(lr)
        assert state.generator.merge(state.generator.head(lr)).dtype == torch.bfloat16
    losses = srgan.discriminator_step(state, sr, hr) | srgan.generator_step(state, sr, hr)
    assert sr.dtype == torch.float32 and {loss.dtype for loss in losses.values()} == {torch.float32}


# --- The report, reproduced


def test_the_report_is_reproduced_and_goes_on_where_it_was_stopped(store, tmp_path):
    changes = {"scale": 2, "hr_size": 48, "channels": 4, "residual_blocks": 1, "content": "pixel", "batch_size": 17,
               "epochs": 1.0}
    next(srgan.reproduce_report(store, tmp_path, changes, looks=(1, 9)))
    assert not (tmp_path / "stages.txt").exists()
    steps = [event.step for event in srgan.reproduce_report(store, tmp_path, changes, looks=(1, 9))]
    assert 2 in steps  # 34 faces in two batches
    assert sorted(path.name for path in tmp_path.glob("report-*")) == ["report-000001.safetensors", "report-000002.safetensors"]
    generator, config, _ = srgan.load_generator(tmp_path / "report-000002.safetensors")
    rows = srgan.evaluate(generator, config, store, store.indices("test"))
    table, told = srgan.results_table(srgan.summarise(rows, config, "test")), (tmp_path / "stages.txt").read_text()
    assert table in told and "report, 1 updates" in told and "sharp, " in told and (tmp_path / "stages.png").exists()
    sharp = srgan.load_generator(tmp_path / "sharp-000002" / "generator.safetensors")[1]
    assert (sharp.preset_name, sharp.scale, sharp.crop, sharp.hr_size) == ("sharp", 2, 144, 48)  # the report's view
    with pytest.raises(ValueError, match="started with channels=4, not 8"):
        list(srgan.reproduce_report(store, tmp_path, changes | {"channels": 8, "epochs": 2.0}))
