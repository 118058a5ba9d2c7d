"""The step functions by hand, and runs that are stopped, continued, changed and broken."""

import csv
import json
import math
import signal
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from conftest import TINY

import srgan_utils as srgan

CPU = torch.device("cpu")
REPORT = {"hr_size": 32, "channels": 8, "residual_blocks": 1, "batch_size": 2, "precision": "fp32", "content": "pixel"}


def tiny_state(preset="sharp", **changes):
    config = srgan.Config.preset(preset, **((TINY if preset == "sharp" else REPORT) | changes)).for_faces(8)
    return srgan.TrainState.create(config, CPU)


def images(count=2, scale=4, seed=0):
    hr = torch.cat([srgan.synthetic_face(seed + i) for i in range(count)])
    hr = srgan.quantise(srgan.bicubic(hr, 32))
    return srgan.quantise(srgan.bicubic(hr, 32 // scale)), hr


def run(store, folder, preset=None, changes=None, **options):
    return list(srgan.train(store, folder, preset, changes, **options))


def history(folder):
    with open(folder / "history.csv", newline="") as file:
        return list(csv.DictReader(file))


def newest(folder):
    return srgan.newest_checkpoint(folder / "ckpt")


def recorded(folder):
    return json.loads((folder / "config.json").read_text())["config"]


def differences(a, b, at=""):
    """Where two nests of plain data differ."""
    if isinstance(a, dict) and isinstance(b, dict) and list(a) == list(b):
        return [each for key in a for each in differences(a[key], b[key], f"{at}/{key}")]
    if isinstance(a, (list, tuple)) and len(a) == len(b):
        return [each for i, pair in enumerate(zip(a, b)) for each in differences(*pair, f"{at}/{i}")]
    equal = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if equal else [at]


def assert_same_run(a, b):
    """Weights, statistics, moments, moving average, exported files, history: all but `seconds`."""
    one, other = newest(a), newest(b)
    assert one["update"] == other["update"]
    for part in ("generator", "discriminator", "ema", "g_optimizer", "d_optimizer", "scaler"):
        assert (part in one) == (part in other)
        assert differences(one.get(part), other.get(part), part) == []
    assert [row | {"seconds": ""} for row in history(a)] == [row | {"seconds": ""} for row in history(b)]
    for name in ("generator.safetensors", "pretrained.safetensors"):
        states = [srgan.load_generator(folder / name)[0].state_dict() for folder in (a, b) if (folder / name).exists()]
        assert len(states) != 1 and (not states or differences(dict(states[0]), dict(states[1])) == [])


# --- One step


@pytest.mark.parametrize("preset", ["sharp", "report"])
def test_pretraining_lowers_the_loss(preset):
    """Repeated on one batch; the loss is the pixel loss of the network that was."""
    state = tiny_state(preset, pretrain_learning_rate=2e-3, pretrain_steps=100, warmup_steps=0, decay="none")
    lr, hr = images()
    first = srgan.pixel_loss(deepcopy(state.generator)(lr), hr).item()
    losses = [srgan.pretrain_step(state, lr, hr)["pixel"].item() for _ in range(15)]
    assert losses[0] == pytest.approx(first)
    assert losses[-1] < 0.8 * losses[0]


def weights(network):
    return {name: value.clone() for name, value in network.named_parameters()}


def test_each_step_moves_its_own_network():
    """Neither weights nor gradients of the other, while D's step sees sr of a graph that reaches into G."""
    state = tiny_state(pretrain_steps=0)
    lr, hr = images()
    sr = state.generator(lr)
    before = weights(state.generator), weights(state.discriminator)
    srgan.discriminator_step(state, sr, hr)
    assert differences(weights(state.generator), before[0]) == []
    assert all(p.grad is None for p in state.generator.parameters())
    assert len(differences(weights(state.discriminator), before[1])) == len(before[1])

    middle = weights(state.discriminator)
    gradients = [p.grad.clone() for p in state.discriminator.parameters()]
    srgan.generator_step(state, sr, hr)
    assert differences(weights(state.discriminator), middle) == []
    assert differences([p.grad for p in state.discriminator.parameters()], gradients) == []
    assert all(p.requires_grad for p in state.discriminator.parameters())
    assert len(differences(weights(state.generator), before[0])) == len(before[0])


@pytest.mark.parametrize("preset, changes", [
    ("sharp", {}), ("sharp", {"adversarial": "relativistic"}), ("sharp", {"content": "vgg", "vgg": "random"}), ("report", {}),
])
def test_every_generator_weight_gets_a_gradient(preset, changes):
    """From content and adversarial loss together, and from the adversarial alone."""
    for only in ({}, {"content_weight": 0.0, "pixel_weight": 0.0}):
        state = tiny_state(preset, pretrain_steps=0, **changes, **only)
        lr, hr = images()
        srgan.generator_step(state, state.generator(lr), hr)
        for name, p in state.generator.named_parameters():
            assert p.grad is not None and p.grad.abs().max() > 0, name


def test_vgg_stays_as_it_is():
    state = tiny_state(content="vgg", vgg="random", pretrain_steps=0)
    before = deepcopy(state.vgg.state_dict())
    lr, hr = images()
    losses = srgan.generator_step(state, state.generator(lr), hr)
    assert losses["content"] > 0
    assert differences(dict(state.vgg.state_dict()), dict(before)) == []


@pytest.mark.parametrize("update, share", [(3, 1 / 4), (4, 2 / 4), (6, 1.0), (9, 1.0)])
def test_generator_loss_by_hand(update, share):
    """content_weight content + pixel_weight pixel + the ramp's share of adversarial_weight adversarial."""
    state = tiny_state(ramp_steps=4, adversarial_weight=0.5, content_weight=2.0, pixel_weight=3.0)
    state.update = update
    lr, hr = images()
    losses = srgan.generator_step(state, state.generator(lr), hr)
    expected = 2 * losses["content"] + 3 * losses["pixel"] + share * 0.5 * losses["adversarial"]
    torch.testing.assert_close(losses["g_loss"], expected)
    assert min(losses[name].item() for name in ("content", "pixel", "adversarial")) > 1e-3


def test_the_discriminator_comes_first(monkeypatch, store):
    """And the generator meets the new one; both see the images of one pass."""
    order = []
    for name in ("discriminator_step", "generator_step"):
        def note(state, sr, hr, name=name, step=getattr(srgan, name)):
            order.append((name, sr.detach().clone(), state.discriminator.layers[0][0].bias.detach().clone()))
            return step(state, sr, hr)
        monkeypatch.setattr(srgan, name, note)
    srgan._one_update(tiny_state(pretrain_steps=0), store)
    assert [each[0] for each in order] == ["discriminator_step", "generator_step"]
    assert torch.equal(order[0][1], order[1][1]) and not torch.equal(order[0][2], order[1][2])


# --- Moving average and schedule


def test_moving_average_by_hand():
    """0.9 of the old and 0.1 of the new, BatchNorm's statistics included, its counter copied."""
    ema, generator = (tiny_state("report", seed=seed).generator for seed in (1, 2))
    generator.train()(torch.rand(2, 3, 8, 8))
    before, new = deepcopy(ema.state_dict()), generator.state_dict()
    srgan.update_ema(ema, generator, 0.9)
    for name, value in ema.state_dict().items():
        expected = 0.9 * before[name] + 0.1 * new[name] if value.is_floating_point() else new[name]
        torch.testing.assert_close(value, expected)
    assert not torch.allclose(new["merge.1.running_mean"], before["merge.1.running_mean"])


def test_moving_average_of_a_run(store):
    """Update k (from 0) keeps min(ema, (1 + k) / (10 + k)) of the old: the first takes nine tenths of the new."""
    state = tiny_state(ema=0.15)
    expected = {name: value.clone() for name, value in state.generator.state_dict().items()}
    for keep in (0.1, 0.15, 0.15):
        srgan._one_update(state, store)
        expected = {name: keep * expected[name] + (1 - keep) * value for name, value in state.generator.state_dict().items()}
        for name, value in state.ema.state_dict().items():
            torch.testing.assert_close(value, expected[name])
    assert state.best is state.ema and not any(p.requires_grad for p in state.ema.parameters())


def test_learning_rate_by_hand():
    """Each stage warms up, then falls to a hundredth along a cosine; past its planned end it stays there."""
    config = srgan.Config(learning_rate=1e-3, pretrain_learning_rate=1e-2, warmup_steps=4, pretrain_steps=100, steps=50,
                          decay_steps=50)

    def cosine(base, done):
        return base * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)

    expected = {0: 1e-2 / 4, 1: cosine(1e-2, 0.01) / 2, 3: cosine(1e-2, 0.03), 50: 1e-2 * 0.505, 99: cosine(1e-2, 0.99),
                100: 1e-3 / 4, 103: cosine(1e-3, 0.06), 125: 1e-3 * 0.505, 149: cosine(1e-3, 0.98), 150: 1e-5, 1000: 1e-5}
    for update, value in expected.items():
        assert srgan._learning_rate(config, update) == pytest.approx(value), update
    constant = replace(config, decay="none", warmup_steps=0)
    assert {srgan._learning_rate(constant, update) for update in (0, 50, 99)} == {1e-2}
    assert {srgan._learning_rate(constant, update) for update in (100, 500)} == {1e-3}


def test_the_learning_rate_reaches_the_optimiser(store):
    state = tiny_state()
    for update in range(5):
        srgan._one_update(state, store)
        assert state.g_optimizer.param_groups[0]["lr"] == pytest.approx(srgan._learning_rate(state.config, update))
    assert state.d_optimizer.param_groups[0]["lr"] == pytest.approx(srgan._learning_rate(state.config, 4))
    assert state.g_optimizer.param_groups[0]["betas"] == (state.config.beta1, state.config.beta2)


# --- A whole run


def test_a_run_leaves_what_it_promises(tiny_run, store):
    rows = history(tiny_run)
    assert list(rows[0])[0] == "step" and [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["stage"] for row in rows] == ["pretrain"] * 3 + ["adversarial"] * 3
    assert all(row["d_loss"] == "" for row in rows[:3]) and all(float(row["d_loss"]) > 0 for row in rows[3:])
    assert all(float(row["g_loss"]) > 0 and float(row["pixel"]) > 0 for row in rows)
    record = json.loads((tiny_run / "config.json").read_text())
    assert record["store"] == store.fingerprint and "torch" in record["environment"]
    expected = {"pretrain_steps": 3, "steps": 3, "decay_steps": 3, "precision": "fp32", "scale": 4}
    assert expected.items() <= record["config"].items()
    samples = sorted((tiny_run / "samples").iterdir())
    assert [path.name for path in samples] == ["update-0000003.png", "update-0000006.png"]
    strip = srgan.load_image(samples[-1])
    assert strip.shape[-1] == 4 * 32 and strip.shape[-2] % 32 == 0 and strip.std() > 0.05
    saved = newest(tiny_run)
    for name, update in (("pretrained", 3), ("generator", 6)):
        generator, config, about = srgan.load_generator(tiny_run / f"{name}.safetensors", scale=4)
        assert about["update"] == update and about["data"]["fingerprint"] == store.fingerprint
        assert config.hr_size == 32 and about["validation"]["images"] >= 1
    assert differences(dict(generator.state_dict()), dict(saved["ema"])) == []  # the one to use is the moving average


def test_progress(store, tmp_path):
    events = run(store, tmp_path / "r", "sharp", TINY)
    assert [event.step for event in events] == sorted({event.step for event in events}) and events[-1].step == 6
    assert [event.done for event in events] == [False] * (len(events) - 1) + [True]
    assert {event.total for event in events} == {6} and events[-1].saved
    assert {event.stage for event in events if event.step <= 3} == {"pretrain"}
    drawn = [event.sample for event in events if event.sample]
    assert [path.name for path in drawn] == ["update-0000003.png", "update-0000006.png"] and all(path.exists() for path in drawn)
    assert all(event.images_per_second > 0 and event.seconds_left >= 0 for event in events)
    assert {"g_loss", "pixel"} <= events[0].losses.keys() and "d_loss" in events[-1].losses


@pytest.mark.parametrize("preset, changes", [("sharp", TINY), ("report", REPORT | {"steps": 4, "pretrain_steps": 2})])
def test_the_same_seed_gives_the_same_run(store, tmp_path, preset, changes):
    """Bit for bit, whatever the caller's own random numbers; another seed another one."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(ord(name))
        run(store, tmp_path / name, preset, changes | {"seed": seed})
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert len(differences(newest(tmp_path / "a")["generator"], newest(tmp_path / "c")["generator"])) > 3


# --- Stopped and continued


LONG = TINY | {"pretrain_steps": 4, "steps": 5, "save_steps": 1000, "sample_steps": 1}  # reports every update, saves rarely


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    """The run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(store, folder, "sharp", LONG)
    return folder


def stop_by_closing(store, folder, at):
    events = srgan.train(store, folder, "sharp", LONG)
    for progress in events:
        if progress.step >= at:
            break
    events.close()


def stop_by_leaving(store, folder, at):
    for progress in srgan.train(store, folder, "sharp", LONG):
        if progress.step >= at:
            break


def stop_in_the_loop(store, folder, at):
    """Ctrl-C while the caller shows something."""
    with pytest.raises(KeyboardInterrupt):
        for progress in srgan.train(store, folder, "sharp", LONG):
            if progress.step >= at:
                signal.raise_signal(signal.SIGINT)


def stop_in_an_update(store, folder, at):
    """Ctrl-C in the middle of an update: it is finished first."""
    step, calls = srgan.update_ema, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        step(*args)

    srgan.update_ema = interrupted
    try:
        with pytest.raises(KeyboardInterrupt, match=f"update {at} of 9"):
            for _ in srgan.train(store, folder, "sharp", LONG):
                pass
    finally:
        srgan.update_ema = step


def stop_by_time(store, folder, at):
    """A deadline long past: one update, and again until there are enough."""
    for _ in range(at):
        assert run(store, folder, "sharp", LONG, max_minutes=1e-9)[-1].done


@pytest.mark.parametrize("stop", [stop_by_closing, stop_by_leaving, stop_in_the_loop, stop_in_an_update, stop_by_time])
@pytest.mark.parametrize("at", [2, 4, 6])
def test_a_stopped_run_ends_like_one_never_stopped(store, tmp_path, whole, stop, at):
    """In pre-training, at the change of stage and after it."""
    folder, handler = tmp_path / "run", signal.getsignal(signal.SIGINT)
    stop(store, folder, at)
    assert signal.getsignal(signal.SIGINT) is handler
    assert newest(folder)["update"] == at and (folder / "generator.safetensors").exists()
    events = run(store, folder)
    assert any(f"continues at update {at} of 9" in note for note in events[0].notes)
    assert events[-1].step == 9
    assert_same_run(folder, whole)


def test_a_run_of_before_a_field_was_there_continues(store, tmp_path):
    """With that field's default; another value would make it another run."""
    changes = LONG | {"pretrain_steps": 2, "steps": 2, "upsampling": "shuffle"}
    stop_by = iter(srgan.train(store, tmp_path / "run", "sharp", changes))
    next(stop_by)
    stop_by.close()
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    saved = newest(tmp_path / "run")
    for config in (record["config"], saved["config"]):
        del config["upsampling"], config["compile"]
    del record["sha256"], saved["format"]
    (tmp_path / "run" / "config.json").write_bytes(srgan._sealed(record))
    srgan.save_checkpoint(tmp_path / "run" / "ckpt", saved)
    with pytest.raises(ValueError, match="started with upsampling=shuffle, not blur"):
        next(srgan.train(store, tmp_path / "run", None, {"upsampling": "blur"}))
    assert run(store, tmp_path / "run")[-1].step == 4


def test_batch_norm_goes_on_learning_after_the_change_of_stage(store, tmp_path):
    """Without a moving average, what is measured then is the network that is trained."""
    changes = LONG | {"ema": 0.0, "batch_norm": 0.1}
    run(store, tmp_path / "whole", "sharp", changes)
    for progress in srgan.train(store, tmp_path / "cut", "sharp", changes):
        if progress.step == 4:
            break
    run(store, tmp_path / "cut")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    counted = newest(tmp_path / "whole")["generator"]["merge.1.num_batches_tracked"]
    assert counted == 9


def test_a_run_that_died_ends_like_one_that_did_not(store, tmp_path, whole):
    """The power fails after updates that no checkpoint holds: history has no step twice."""
    folder, dead = tmp_path / "run", tmp_path / "dead"
    stop_by_closing(store, folder, 3)
    ckpt = {path.name: path.read_bytes() for path in (folder / "ckpt").iterdir()}
    stop_by_closing(store, folder, 7)
    folder.rename(dead)
    for path in (dead / "ckpt").iterdir():
        path.unlink()
    for name, data in ckpt.items():
        (dead / "ckpt" / name).write_bytes(data)
    run(store, dead)
    assert_same_run(dead, whole)


def test_checkpoints_come_every_so_often(store, tmp_path):
    saved = [event.step for event in run(store, tmp_path / "r", "sharp", TINY | {"save_steps": 2, "steps": 5}) if event.saved]
    assert saved == [2, 3, 4, 6, 8]  # every second, at the change of stage, at the end
    saved = [event.step for event in run(store, tmp_path / "m", "sharp", LONG | {"sample_steps": 1000, "save_minutes": 0.01})
             if event.saved]
    assert {4, 9} <= set(saved)


def test_a_finished_run_is_done_at_once(store, tiny_run):
    before = newest(tiny_run), history(tiny_run)
    events = run(store, tiny_run)
    assert [(event.step, event.done) for event in events] == [(6, True)]
    assert differences(newest(tiny_run), before[0]) == [] and history(tiny_run) == before[1]


def test_raising_steps_continues_at_the_final_learning_rate(store, tmp_path):
    run(store, tmp_path / "r", "sharp", TINY)
    first = history(tmp_path / "r")
    assert run(store, tmp_path / "r", changes={"steps": 6})[-1].step == 9
    rows = history(tmp_path / "r")
    assert rows[:6] == first and [int(row["step"]) for row in rows] == list(range(1, 10))
    assert [float(row["learning_rate"]) for row in rows[6:]] == pytest.approx([1e-6] * 3, rel=1e-3)
    assert recorded(tmp_path / "r")["steps"] == 6 and recorded(tmp_path / "r")["decay_steps"] == 3


@pytest.mark.parametrize("changes, old, new", [
    ({"scale": 8}, "scale=4", "8"), ({"seed": 9}, "seed=0", "9"), ({"batch_size": 3}, "batch_size=2", "3"),
    ({"learning_rate": 2e-4}, "learning_rate=0.0001", "0.0002"), ({"pretrain_steps": 4}, "pretrain_steps=3", "4"),
    ({"content": "pixel"}, "content=features", "pixel"), ({"decay_steps": 99}, "decay_steps=3", "99"),
])
def test_another_value_is_another_run(store, tiny_run, changes, old, new):
    """Refused with the field and both values, and nothing is touched."""
    before = {path: path.read_bytes() for path in tiny_run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=rf"{old}, not {new}\b"):
        run(store, tiny_run, changes=changes)
    with pytest.raises(ValueError, match="preset_name=sharp, not demo"):
        run(store, tiny_run, "demo")
    assert {path: path.read_bytes() for path in tiny_run.rglob("*") if path.is_file()} == before


def test_the_same_values_are_the_same_run(store, tiny_run):
    assert run(store, tiny_run, "sharp", TINY | {"scale": 4, "save_steps": 7, "sample_steps": 9})[-1].done


def test_another_store_is_refused(store, tiny_run, tmp_path):
    other = srgan.prepare("synthetic", tmp_path / "store", limit=17)
    with pytest.raises(ValueError, match="other faces"):
        run(other, tiny_run)


def test_no_run_starts_on_top_of_lost_checkpoints(store, tmp_path):
    folder, names = tmp_path / "r", []
    run(store, folder, "sharp", TINY)
    for path in (folder / "ckpt").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
        names.append(path.name)
    with pytest.raises(ValueError) as caught:
        run(store, folder)
    assert len(names) == 2 and all(name in str(caught.value) for name in names)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="verifies"):
        run(store, folder, "sharp", TINY)


def test_a_config_that_is_gone_is_taken_from_the_checkpoint(store, tmp_path):
    """And a damaged one is named, with what to do."""
    run(store, tmp_path / "r", "sharp", TINY)
    path = tmp_path / "r" / "config.json"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"steps": 3', b'"steps": 4'))
    with pytest.raises(ValueError, match=r"config\.json is damaged .*: delete this file, and the run continues"):
        run(store, tmp_path / "r")
    path.unlink()
    with pytest.raises(ValueError, match="seed=0, not 1"):
        run(store, tmp_path / "r", changes={"seed": 1})
    assert run(store, tmp_path / "r")[-1].step == 6 and path.read_bytes() == whole


# --- Broken numbers


@pytest.mark.parametrize("name, at", [("pretrain_step", 3), ("discriminator_step", 6), ("generator_step", 5)])
def test_a_loss_that_is_not_finite_stops_the_run(store, tmp_path, monkeypatch, name, at):
    """With the update, the loss and the last good checkpoint; which then is there, and good."""
    step, calls = getattr(srgan, name), []

    def broken(state, *args):
        losses = step(state, *args)
        calls.append(state.update)
        if state.update + 1 == at:
            losses[list(losses)[0]] = torch.tensor(math.inf)
        return losses

    monkeypatch.setattr(srgan, name, broken)
    changes = TINY | {"save_steps": 2, "pretrain_steps": 4, "steps": 4}
    loss = "d_loss" if name == "discriminator_step" else "g_loss"
    last = {3: 2, 6: 4, 5: 4}[at]
    with pytest.raises(FloatingPointError, match=rf"update {at}: {loss} is inf.* update {last} in .*ckpt"):
        run(store, tmp_path / "r", "sharp", changes)
    assert at - 1 in calls and newest(tmp_path / "r")["update"] == last
    assert [int(row["step"]) for row in history(tmp_path / "r")] == list(range(1, at))
    monkeypatch.undo()
    assert run(store, tmp_path / "r")[-1].step == 8
    assert [int(row["step"]) for row in history(tmp_path / "r")] == list(range(1, 9))


# --- Length, name, precision


def test_for_minutes_sets_a_length_once(store, tmp_path):
    """In proportion to the preset's stages; from then on it is data."""
    changes = TINY | {"pretrain_steps": 200, "steps": 100}
    events = srgan.train(store, tmp_path / "r", "sharp", changes, for_minutes=0.02)
    next(events)
    events.close()
    found = recorded(tmp_path / "r")
    assert found["pretrain_steps"] >= 1 and found["steps"] >= 1 and found["decay_steps"] == found["steps"]
    assert abs(found["pretrain_steps"] - 2 * found["steps"]) <= 2
    notes = run(store, tmp_path / "r", for_minutes=5, max_minutes=1e-9)[0].notes
    assert any("keeps its own length" in note for note in notes)
    assert {name: recorded(tmp_path / "r")[name] for name in ("pretrain_steps", "steps")} == {
        name: found[name] for name in ("pretrain_steps", "steps")}


def test_for_minutes_follows_the_time_an_update_takes(store, monkeypatch):
    """A clock by hand: 1 s for an update of pre-training, 3 s for an adversarial one."""
    clock = [0.0]

    def update(state, store):
        clock[0] += 1 if state.update < state.config.pretrain_steps else 3
        state.update += 1
        return {"loss": torch.tensor(0.0)}

    monkeypatch.setattr(srgan, "_one_update", update)
    monkeypatch.setattr(srgan.time, "perf_counter", lambda: clock[0])
    config = srgan.Config.preset("sharp", **(TINY | {"pretrain_steps": 400, "steps": 200})).for_faces(8)
    fitted = srgan._fit_to_minutes(config, store, CPU, 50)
    assert 0.9 * 3000 <= fitted.pretrain_steps + 3 * fitted.steps <= 3000  # nearly all of 50 min, and no more
    assert abs(fitted.pretrain_steps - 2 * fitted.steps) <= 2 and fitted.decay_steps == fitted.steps
    alone = srgan._fit_to_minutes(replace(config, steps=0, decay_steps=0), store, CPU, 50)
    assert alone.steps == 0 and 0.9 * 3000 <= alone.pretrain_steps <= 3000


def test_epochs_become_updates(store, tmp_path):
    """3 epochs of 34 faces in batches of 8: ceil(12.75)."""
    events = srgan.train(store, tmp_path / "r", "report", REPORT | {"batch_size": 8}, max_minutes=1e-9)
    next(events)
    assert recorded(tmp_path / "r")["steps"] == 13 and recorded(tmp_path / "r")["pretrain_steps"] == 0


def test_run_name(store):
    """Another field, another name; a longer run keeps its own."""
    name = srgan.run_name(srgan.Config(), store)
    assert name.startswith("sharp-x4-")
    for free in ({"steps": 99}, {"save_steps": 7}, {"precision": "fp32"}):
        assert srgan.run_name(srgan.Config(**free), store) == name
    others = [{"scale": 8}, {"seed": 1}, {"content": "pixel"}, {"learning_rate": 2e-4}, {"pretrain_steps": 5}]
    configs = [srgan.Config(**other) for other in others] + [srgan.Config.preset("demo")]
    names = [srgan.run_name(config, store) for config in configs]
    assert len({name, *names}) == 7


@pytest.mark.parametrize("asked, capability, expected", [
    ("auto", (7, 5), "fp16"), ("auto", (8, 0), "bf16"), ("auto", (9, 0), "bf16"), ("auto", (6, 1), "fp16"),
    ("bf16", (7, 5), "fp16"), ("bf16", (8, 9), "bf16"), ("fp16", (7, 5), "fp16"), ("fp16", (8, 0), "fp16"),
    ("fp32", (7, 5), "fp32"), ("fp32", (9, 0), "fp32"),
])
def test_precision_on_a_gpu(monkeypatch, asked, capability, expected):
    """A T4 (7.5) only emulates bf16, whatever `is_bf16_supported` says."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kw: True)
    assert srgan.resolve_precision(asked, torch.device("cuda")) == expected


@pytest.mark.parametrize("asked, native, expected", [
    ("auto", True, "bf16"), ("auto", False, "fp32"), ("fp16", True, "bf16"), ("fp16", False, "fp32"),
    ("fp32", True, "fp32"), ("bf16", True, "bf16"), ("bf16", False, "fp32"),
])
def test_precision_on_a_cpu(monkeypatch, asked, native, expected):
    for unit in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{unit}_supported", lambda: native, raising=False)
    assert srgan.resolve_precision(asked, CPU) == expected


def test_precision_is_resolved_once(store, tmp_path, monkeypatch):
    """Recorded and kept; where the device lacks it, the change is announced and recorded."""
    monkeypatch.setattr(srgan, "resolve_precision", lambda precision, device: "bf16" if precision == "auto" else precision)
    run(store, tmp_path / "r", "sharp", TINY | {"precision": "auto", "pretrain_steps": 1, "steps": 1})
    assert recorded(tmp_path / "r")["precision"] == "bf16"
    events = run(store, tmp_path / "r", changes={"steps": 2})
    assert recorded(tmp_path / "r")["precision"] == "bf16" and not any("precision" in note for note in events[0].notes)
    monkeypatch.setattr(srgan, "resolve_precision", lambda precision, device: "fp32")
    events = run(store, tmp_path / "r", changes={"steps": 3})
    assert any("precision changes from bf16 to fp32" in note for note in events[0].notes)
    assert recorded(tmp_path / "r")["precision"] == "fp32" and events[-1].step == 4


@pytest.mark.parametrize("before, after", [("bf16", "fp16"), ("fp16", "fp32")])
def test_a_run_moves_to_a_device_of_another_precision(store, tmp_path, monkeypatch, before, after):
    """As from an A100 to a T4, whose loss scaler then starts anew; and back."""
    for precision, changes in ((before, TINY | {"steps": 1, "pretrain_steps": 1}), (after, {"steps": 2})):
        monkeypatch.setattr(srgan, "resolve_precision", lambda *args, precision=precision: precision)
        events = run(store, tmp_path / "r", "sharp" if precision == before else None, changes)
    assert events[-1].step == 3 and recorded(tmp_path / "r")["precision"] == after


@pytest.mark.parametrize("changes", [{}, {"content": "vgg", "vgg": "random"}, {"adversarial": "bce"}])
def test_bf16_runs_on_a_cpu(store, tmp_path, changes):
    """Networks in bf16, weights, images and losses in fp32."""
    run(store, tmp_path / "r", "sharp", TINY | {"precision": "bf16"} | changes)
    saved = newest(tmp_path / "r")
    assert {value.dtype for value in saved["generator"].values()} == {torch.float32}
    assert all(math.isfinite(float(row["g_loss"])) for row in history(tmp_path / "r"))
    state = tiny_state(precision="bf16", pretrain_steps=0, **changes)
    lr, hr = images()
    with state.autocast():
        sr = state.generator(lr)
        assert state.generator.merge(state.generator.head(lr)).dtype == torch.bfloat16
    losses = srgan.discriminator_step(state, sr, hr) | srgan.generator_step(state, sr, hr)
    assert sr.dtype == torch.float32 and {loss.dtype for loss in losses.values()} == {torch.float32}


# --- torch.compile


def test_compiled_updates_give_the_same_weights(store, tmp_path, monkeypatch):
    """Traced and differentiated as for a GPU, but run without its kernels, which take a compiler."""
    compile_, seen = torch.compile, []

    def traced(network):
        seen.append(type(network).__name__)
        return compile_(network, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", traced)
    weights = {}
    for compiled in (False, True):
        events = list(srgan.train(store, tmp_path / str(compiled), None, TINY | {"compile": compiled}))
        assert events[-1].step == 6
        weights[compiled] = srgan.load_generator(tmp_path / str(compiled) / "generator.safetensors")[0].state_dict()
    assert seen == ["Generator", "Discriminator"]
    for name, value in weights[True].items():
        torch.testing.assert_close(value, weights[False][name], rtol=0, atol=1e-5)


def test_when_compiling_pays(store, tmp_path):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    long, short = (srgan.Config(pretrain_steps=steps, steps=10_000) for steps in (10_000, 9_999))
    assert srgan._compile_pays(long, gpu) and not srgan._compile_pays(short, gpu) and not srgan._compile_pays(long, cpu)
    next(srgan.train(store, tmp_path, None, TINY))
    assert json.loads((tmp_path / "config.json").read_text())["config"]["compile"] is False  # decided, and recorded


# --- The report, reproduced


@pytest.mark.parametrize("faces, epochs, stages", [
    (20_000, 3.0, {"10 batches": 10, "epoch 1": 2_500, "epoch 2": 5_000, "epoch 3": 7_500}),
    (100, 1.5, {"10 batches": 10, "epoch 1": 13, "19 batches": 19}),
    (40, 2.0, {"epoch 1": 5, "epoch 2": 10}),
])
def test_when_the_report_looks_at_its_faces(faces, epochs, stages):
    assert srgan._report_stages(srgan.Config.preset("report", epochs=epochs), faces) == stages


def test_the_report_is_reproduced_and_goes_on_where_it_was_stopped(store, tmp_path):
    changes = {"scale": 2, "hr_size": 48, "channels": 4, "residual_blocks": 1, "content": "pixel", "batch_size": 17,
               "epochs": 1.0}
    events = srgan.reproduce_report(store, tmp_path, changes)
    next(events)
    events.close()
    assert not (tmp_path / "stages.json").exists()
    steps = [event.step for event in srgan.reproduce_report(store, tmp_path, changes)]
    assert steps[0] == 2 and not (tmp_path / "report-000004.safetensors").exists()  # 34 faces in two batches
    first = (tmp_path / "report-000002.safetensors").read_bytes()
    for _ in srgan.reproduce_report(store, tmp_path, changes | {"epochs": 2.0}):
        pass
    found = json.loads((tmp_path / "stages.json").read_text())
    assert [(each["stage"], each["update"]) for each in found["stages"][:2]] == [("report, epoch 1", 2), ("report, epoch 2", 4)]
    assert (tmp_path / "report-000002.safetensors").read_bytes() == first
    assert "content=pixel" in found["note"] and (tmp_path / "stages.png").exists()
    generator, config, _ = srgan.load_generator(tmp_path / "report-000004.safetensors")
    rows = srgan.evaluate(generator, config, store, store.indices("test"))
    assert found["stages"][1]["srgan"] == srgan.summarise(rows, config, "test")["srgan"]
    sharp = srgan.load_generator(tmp_path / "sharp-000004" / "generator.safetensors")[1]
    assert (sharp.preset_name, sharp.scale, sharp.crop, sharp.hr_size) == ("sharp", 2, 144, 48)  # the report's view
    table = srgan.stages_table(tmp_path).splitlines()
    assert "144 -> 48 px" in table[0] and f"{found['stages'][1]['srgan']['psnr_rgb']:.2f}" in table[4]
    with pytest.raises(ValueError, match="started with channels=4, not 8"):
        list(srgan.reproduce_report(store, tmp_path, changes | {"epochs": 2.0, "channels": 8}))
