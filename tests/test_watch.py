"""Training that one can watch, and what one takes in and out of a notebook: the live view, its bar, the zip, photos, pictures."""

import re
import zipfile
from collections import namedtuple
from datetime import datetime

import ipywidgets
import pytest
from conftest import TINY, SmallDiscriminator

import srgan_utils as srgan


@pytest.fixture
def displays(monkeypatch):
    """All that is displayed: a list for each display, of what it showed first and of what replaced it."""
    shown = []
    def display(what, display_id=None):
        shown.append([what.data])
        return namedtuple("Handle", "update")(lambda what, history=shown[-1]: history.append(what.data))

    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr(srgan, "Discriminator", SmallDiscriminator)
    return shown


def test_the_live_view_and_the_text_bar_tell_how_far_it_is_and_are_redrawn_in_place(store, tmp_path, displays, capsys):
    events = srgan.progress_bar(srgan.train(store, tmp_path / "r", "sharp", TINY, backup=tmp_path / "b"))
    seen = [(event.step, displays[0][-1]) for event in srgan.watch(events, tmp_path / "r")]
    status, curves, strip = displays  # one display each, whatever happens
    assert seen[0][0] == 1 and seen[-1][0] == 6 and len(status) == 1 + len(seen) >= 5
    for step, text in seen[:-1]:
        assert f"update {step} of 6," in text and "img/s" in text and "left" in text and f'value="{step}" max="6"' in text
    assert "checkpoint: none yet" in seen[0][1] and "checkpoint: update 2, " in seen[1][1]
    assert "update 6 of 6" in status[-1] and "checkpoint: update 6, " in status[-1] and "backup: update " in "".join(status)
    assert 'alt="loss curves up to update 6"' in curves[-1] and len(strip) >= 3 and 'alt="update-0000006, a row for' in strip[-1]
    assert re.search(r"100%\|.*\| adversarial: update 6 of 6.* img/s", capsys.readouterr().err)


def test_a_view_that_is_stopped_says_where_and_goes_on_with_the_strip_of_before(store, tmp_path, displays):
    run = tmp_path / "r"
    *_, last = srgan.watch(srgan.train(store, run, "sharp", TINY | {"sample_steps": 1}, max_minutes=1e-9), run)
    assert last.stopped and f"stopped at update {last.step} of 6" in displays[0][-1]
    displays.clear()
    first = next(events := srgan.watch(srgan.train(store, run), run))
    assert f"continues at update {last.step} of 6" in displays[0][-1] and 'alt="update-' in displays[2][-1]
    events.close()  # leaving it saves
    assert srgan.newest_checkpoint(run / "ckpt")["update"] == first.step > last.step


def test_the_zip_holds_what_one_keeps_and_no_checkpoint(tiny_run, tmp_path):
    with pytest.raises(FileNotFoundError, match="train first"):
        srgan.export_zip(tmp_path)
    with zipfile.ZipFile(srgan.export_zip(tiny_run)) as archive:
        held = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    assert {f"tiny/{name}" for name in ("generator.safetensors", "pretrained.safetensors", "history.csv")} <= set(held)
    assert list(tiny_run.rglob("*.pt")) and not any(name.endswith(".pt") for name in held)
    assert all((tiny_run.parent / name).read_bytes() == data for name, data in held.items())


@pytest.mark.parametrize("name", ["me.png", "C:\\photos\\me.png", "../me.png"])
def test_chosen_photos_lie_in_the_folder_and_nowhere_else(name, tmp_path):
    folder = tmp_path / "in" / "photos"
    widget = srgan.upload_images(folder)
    eight = ({"name": name, "type": "image/png", "size": 3, "content": memoryview(b"abc"), "last_modified": datetime.now()},)
    widget.set_trait("value", {name: {"metadata": {}, "content": b"abc"}} if ipywidgets.__version__ < "8" else eight)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [folder / "me.png"]


def test_pictures_are_shown_with_their_words(tiny_run, displays, tmp_path):
    srgan.show_images([srgan.synthetic_face(0)[0]]).savefig(tmp_path / "p.png")
    for picture in (srgan.history_figure(tiny_run / "history.csv"), tmp_path / "p.png"):
        srgan.show(picture, 'a "face" <b>')
    for (text,) in (displays[0], displays[1]):
        assert 'alt="a &quot;face&quot; &lt;b&gt;"' in text and 'src="data:image/png;base64,iVBOR' in text and "<b>" not in text
