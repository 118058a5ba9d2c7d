"""Data: sources, the store, the split, batches."""

import hashlib
import http.client
import io
import itertools
import os
import shutil
import struct
import sys
import tracemalloc
import warnings
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import conftest
import numpy as np
import pytest
import torch
from PIL import Image

import srgan_utils as srgan

CPU, SMALL = torch.device("cpu"), {"hr_size": 32, "patch_size": 16, "batch_size": 4}
NO_ZIP = "not a zip .*: fetch it again; of pictures, or of another archive"


def picture(number: int, width: int = 178, height: int = 178) -> Image.Image:
    """A picture that no other number has: smooth, cheap, in colour."""
    y, x = np.mgrid[:height, :width]
    waves = [120 + 100 * np.sin((x * (number % 5 + 1) + y * channel) / 25 + number) for channel in (1, 2, 3)]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8))


def encoded(number: int = 0, *size, kind: str = "PNG", **options) -> bytes:
    picture(number, *size).save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def folder_of(folder, names, **size):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number, **size).save(folder / name)
    return folder


def zip_of(path, entries, method=zipfile.ZIP_STORED, last=(), face=encoded(kind="JPEG")):
    """A zip of (name, bytes) pairs, or of names of `face`; `last`: offset, form and values overwritten in the last record."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for entry in entries:
            archive.writestr(*(entry if isinstance(entry, tuple) else (entry, face)))
    if last:
        struct.pack_into(last[1], data := bytearray(path.read_bytes()), data.rindex(b"PK\1\2") + last[0], *last[2:])
        path.write_bytes(data)
    return path


def part(key: str) -> int:
    """The part of the split that a key's checksum falls into."""
    return int(np.searchsorted([84, 89], zlib.crc32(key.encode("utf-8")) % 100))


def named(wanted: int, count: int) -> list[str]:
    return [name for name in (f"face-{n:04}.png" for n in range(1000)) if part(name) == wanted][:count]


def pixels(store) -> np.ndarray:
    return store.faces(range(len(store))).permute(0, 2, 3, 1).numpy()


def same(one, other) -> bool:
    return one.fingerprint == other.fingerprint and np.array_equal(pixels(one), pixels(other))


def refused(message: str, use, *arguments, error=ValueError) -> None:
    with conftest.refused(error, message):
        use(*arguments)


def test_folders_and_zips_become_the_same_store_of_centre_squares(tmp_path):
    source, exif = folder_of(tmp_path / "in", ["b/c/2.png", "b/1.png", "a.png"]), Image.Exif()
    exif[274] = 6
    picture(3).convert("CMYK").save(source / "d.jpg", exif=exif)
    Image.merge("RGBA", [*picture(5).split(), picture(6).getchannel(0)]).save(source / "e.png")
    picture(7, 178, 218).save(source / "t.png")  # CelebA's size: no pixel is resampled
    picture(8, 400, 300).save(source / "w.png")
    names = ["a.png", "b/1.png", "b/c/2.png", "d.jpg", "e.png", "t.png", "w.png"]
    entries = [(name.replace("/", "\\"), (source / name).read_bytes()) for name in names[::-1]]  # as some zips of Windows' are
    zip_of(tmp_path / "in.zip", [*entries, ("b/", b""), ("__MACOSX/b/._1.png", b"litter")])
    for litter in ("b/.DS_Store", "._a.png", "Thumbs.db"):
        (source / litter).write_bytes(b"litter")
    store, other = srgan.prepare(source, tmp_path / "store"), srgan.prepare(tmp_path / "in.zip", tmp_path / "other")
    assert store.names == names and same(store, other) and not store.left_out + other.left_out + store.enlarged
    seen = [srgan.load_image(source / name)[0].permute(1, 2, 0).mul(255).round().numpy() for name in names[:-1]]
    seen[5:] = [seen[5][20:198], np.asarray(picture(8, 400, 300).resize((237, 178), Image.BICUBIC))[:, 29:207]]
    assert np.array_equal(pixels(store), seen)
    picture(9).save(source / "a.png")
    repainted = srgan.prepare(source, tmp_path / "3")
    os.rename(source / "a.png", os.fsencode(source) + b"/caf\xe9.png")  # not UTF-8, as old zips leave them on Linux
    renamed = srgan.prepare(source, tmp_path / "4")
    assert "caf\ufffd.png" in renamed.names and len({each.fingerprint for each in (store, repainted, renamed)}) == 3


def test_what_cannot_be_used_is_left_out_with_its_reason_and_not_inflated_and_decoders_say_nothing(tmp_path, capsys):
    bomb, good = zlib.compress(bytes(100_000_000), 9)[2:-4], encoded()
    left_out = [  # what it holds, what is overwritten in a zip's directory, and the reason
        (b"a text", (), "not an image"), (b"", (), "not an image"), (good[:2000], (), "truncated"),
        (encoded(0, 63, 200), (), "63 x 200"), (encoded(0, 900, 100), (), "narrow"), (good, (8, "<H", 0x801), "encrypted"),
        (good, (16, "<I", 1), "CRC"), (good, (24, "<I", 0xFFFFFFF0), "absurdly large"), (good, (24, "<I", 90), ""),
        (good, (42, "<I", 10**6), "header"), (good, (10, "<H", 99), "compression"),
        (bomb, (10, "<H8xII", zipfile.ZIP_DEFLATED, len(bomb), 9_000), "")]  # says 9,000 bytes and holds 100 MB
    odd, strange = encoded(kind="JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 40), "b\x1b[2J\n\u202e\x9b1m.png"
    tracemalloc.start()
    with warnings.catch_warnings(record=True, action="always") as warned:  # Pillow warns of that EXIF
        for number, (data, last, reason) in enumerate(left_out):
            folder, path = tmp_path / str(number), zip_of(tmp_path / "in.zip", [("a.jpg", odd), (strange, data)], last=last)
            assert srgan.main(["prepare", str(path), "--store", str(folder)]) == 0
            ((name, why),) = srgan.FaceStore(folder).left_out
            assert srgan.FaceStore(folder).names == ["a.jpg"] and name == strange and reason in why and why.isprintable()
            told = capsys.readouterr().out
            assert "1 left out" in told and all(line.isprintable() for line in told.split("\n"))  # no cursor moves
            assert tracemalloc.get_traced_memory()[1] < 20_000_000 and not warned
    tracemalloc.stop()


@pytest.mark.parametrize("make, message", {
    "missing": (lambda path: None, "no such source"), "empty": (lambda path: path.mkdir(), "is empty"),
    "empty zip": (lambda path: zip_of(path, []), "holds no files"), "page": (lambda path: path.write_text("<html>"), NO_ZIP),
    "a picture": (lambda path: path.write_bytes(encoded()), NO_ZIP),
    "half a zip": (lambda path: path.write_bytes(zip_of(path, ["a.jpg"]).read_bytes()[:2500]), "cut off"),
    "no picture": (lambda path: zip_of(path, [("\x1b\n.txt", b"")]), "no usable image .1 left out: .+txt: not an image"),
    "many": (lambda path: zip_of(path, [(f"{n}.png", b"") for n in range(999)]), "999 left out: [^;]*;[^;]*;[^;]*$"),
}.values())
def test_a_source_without_faces_is_one_line_and_is_read_again_once_mended(tmp_path, make, message):
    make(tmp_path / "in.zip")
    refused(message, srgan.prepare, tmp_path / "in.zip", tmp_path / "store", error=(ValueError, FileNotFoundError))
    refused("holds no prepared faces", srgan.FaceStore, tmp_path / "store", error=FileNotFoundError)
    shutil.rmtree(tmp_path / "in.zip", ignore_errors=True)
    assert srgan.prepare(zip_of(tmp_path / "in.zip", ["a.jpg"]), tmp_path / "store").names == ["a.jpg"]


@pytest.mark.parametrize("owner, name, at", [(Image, "open", 1), (Image, "open", 7), (Path, "replace", 1), (Path, "replace", 2)])
def test_an_interrupted_prepare_leaves_no_store_and_starts_over_also_with_another_source(tmp_path, monkeypatch, owner, name, at):
    source, other = folder_of(tmp_path / "in", [f"{n:02}.png" for n in range(10)]), zip_of(tmp_path / "in.zip", ["a.jpg"])
    right, calls, stop = getattr(owner, name), itertools.count(1), mock.Mock(side_effect=KeyboardInterrupt)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, lambda *given, **more: (stop if next(calls) == at else right)(*given, **more))
        srgan.prepare(source, tmp_path / "store")
    refused("holds no prepared faces", srgan.FaceStore, tmp_path / "store", error=FileNotFoundError)
    assert same(srgan.prepare(other, tmp_path / "store"), srgan.prepare(other, tmp_path / "whole"))  # the same one: test_kill.py


@pytest.mark.parametrize("change", [
    lambda source: picture(5).save(source / "c.png"), lambda source: (source / "a.png").unlink(),
    lambda source: (source / "b.png").rename(source / "c.png"), lambda source: picture(5).save(source / "b.png"),
    lambda source: os.utime(source / "b.png", (2e9, 2e9)),
], ids=["one more", "one fewer", "another name", "other pixels", "another time"])
def test_a_source_is_prepared_once_a_changed_one_refused_or_in_notebooks_prepared_anew(tmp_path, monkeypatch, capsys, change):
    monkeypatch.chdir(tmp_path)
    source, place = folder_of(tmp_path / "in", ["a.png", "b.png"]), tmp_path / "store"
    first, before = srgan.prepare(source, place), [path.stat().st_mtime_ns for path in sorted(place.glob("*.*"))]
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", None)  # nothing is decoded again
        assert all(same(srgan.prepare(spelled, place), first) for spelled in (source, str(source), f"{source}/"))
    assert srgan.prepare_faces("in").folder == srgan.prepare_faces("in/").folder and "changed" not in capsys.readouterr().out
    change(source)
    refused(f"{source} has changed since it was prepared into {place}", srgan.prepare, source, place)
    anew, told = srgan.prepare_faces("in"), capsys.readouterr().out
    assert "in has changed since it was prepared: preparing it anew" in told and anew.describe() in told
    assert anew.names == sorted(path.name for path in source.iterdir())
    assert np.array_equal(pixels(anew), [np.asarray(Image.open(source / name)) for name in anew.names])
    inside = [srgan.prepare(source, source / "store") for _ in range(2)]  # no part of its own source
    assert same(*inside) and inside[0].names == anew.names
    shutil.rmtree(source)  # a source that is not there any more is not compared
    assert same(srgan.prepare(source, place), first) and [path.stat().st_mtime_ns for path in sorted(place.glob("*.*"))] == before
    assert srgan.prepare_faces("in").fingerprint == anew.fingerprint and "changed" not in capsys.readouterr().out


def test_a_store_of_another_source_or_limit_of_a_changed_zip_or_a_damaged_one_is_refused_in_one_line(tmp_path):
    source, store = zip_of(tmp_path / "in.zip", ["a.jpg", "b.jpg", "c.jpg"]), tmp_path / "store"
    record, pixels = ((srgan.prepare(source, store).folder / name).read_bytes() for name in ("store.json", "faces.u8"))
    for other, limit in ((folder_of(tmp_path / "other", ["c.png"]), None), (source, 1), ("synthetic", None)):
        refused("already holds", srgan.prepare, other, store, limit)
    refused("has changed since", srgan.prepare, zip_of(source, ["a.jpg", "d.jpg"]), store)
    for spoilt in ((record[:-90], pixels), (b"[]", pixels), (record.replace(b'"names"', b'"name"'), pixels),
                   (record, pixels[:-1]), (record, b"")):
        for name, data in zip(("store.json", "faces.u8"), spoilt):
            (store / name).write_bytes(data)
        refused("is damaged .*: delete it and prepare it again", srgan.FaceStore, store)
        refused("is damaged .*: delete it and prepare it again", srgan.prepare, source, store)


PEOPLE = named(0, 8) + named(1, 1) + named(2, 1)  # as folders, too
CELEBA = [f"img_align_celeba/{n}.jpg" for n in ("000001", "162770", "162771", "182637", "182638", "202599")]
NUMBERS = [f"{n:06}.jpg" for n in range(2, 400)]


@pytest.mark.parametrize("names, key", [
    ([f"folder/{kind}-{n}.jpg" for kind in ("é", "face") for n in range(200)], "base"),
    ([f"{n % 9}/{n}.jpg" for n in range(400)], "base"), ([f"{n % 9}/{n // 9}.jpg" for n in range(400)], "path"),  # nine folders
    ([f"{who}/{n}.jpg" for who in PEOPLE for n in range(4)], "folder"), ([f"{n % 50}/x/{n}.jpg" for n in range(400)], "folder"),
    ([f"{who}/{who}-{n}.jpg" for who in PEOPLE for n in range(9 if who == PEOPLE[0] else 4)], "folder"),  # just a fifth in one
    ([f"{who}/{who}-{n}.jpg" for who in PEOPLE for n in range(10 if who == PEOPLE[0] else 4)], "base"),
    ([*CELEBA, *NUMBERS, "mine.jpg"], "base"), ([name[:-3] + "png" for name in [*CELEBA, *NUMBERS]], "base"), (NUMBERS, "base"),
], ids=str)
def test_the_split_is_crc32_of_the_person_the_name_or_the_path(names, key):
    key = {"base": lambda name: name.rpartition("/")[2], "folder": lambda name: name.rpartition("/")[0], "path": str}[key]
    assert srgan.split_of(names).tolist() == [part(key(name)) for name in names]


def test_from_three_faces_on_every_part_has_one_and_none_moves_without_need(tmp_path):
    for seed, count in itertools.product(range(40), range(1, 12)):
        names = [f"{seed}-{n}.jpg" for n in range(count)]
        wanted, parts = [part(name) for name in names], srgan.split_of(names).tolist()
        if count < 3:  # too few for three parts: all are learned from
            assert parts == [0] * count
        else:
            assert len(set(parts)) == 3 and sum(map(int.__ne__, parts, wanted)) == 3 - len(set(wanted))
    people = srgan.split_of([f"{who}/{n}.jpg" for who in named(0, 12) for n in range(3)]).reshape(12, 3)
    assert set(people.flat) == {0, 1, 2} and (people == people[:, :1]).all()  # a person is in one part
    usable = [*named(0, 3), *((name, b"") for name in named(1, 2) + named(2, 2))]  # of these three are
    assert sorted(srgan.prepare(zip_of(tmp_path / "in.zip", usable), tmp_path / "store").split) == [0, 1, 2]


@pytest.mark.parametrize("limit", [1, 17, 100, 5_000])
@pytest.mark.parametrize("names", [[f"{n:04}.jpg" for n in range(600)], [f"{n % 30}/{n}.jpg" for n in range(240)],
                                   [f"{n % 2}/{n // 2}.jpg" for n in range(600)]], ids=["names", "persons", "paths"])
def test_limit_takes_so_many_of_each_part_spread_evenly_and_moves_none_to_another(tmp_path, monkeypatch, names, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own limit: restored, though many threads read
    store = srgan.prepare(zip_of(tmp_path / "in.zip", names), tmp_path / "store", limit)
    for its, wanted in enumerate([limit, limit / 17, 2 * limit / 17]):
        members = sorted(name for name, code in zip(names, srgan.split_of(names)) if code == its)
        places = [members.index(name) for name, code in zip(store.names, store.split) if code == its]
        assert len(places) == min(max(1, round(wanted)), len(members))
        assert np.ptp(np.diff([*places, places[0] + len(members)])) <= 1  # around the end, too
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_enlarged_faces_are_not_in_test_where_there_are_others(tmp_path):
    small, large, trained = named(2, 4)[:2], named(2, 4)[2:], named(0, 1)
    source = folder_of(tmp_path / "in", small + trained, width=120, height=150)
    assert len(srgan.prepare(source, tmp_path / "alone").indices("test")) == 1
    store = srgan.prepare(folder_of(source, large), tmp_path / "store")
    assert sorted(store.enlarged) == sorted(small + trained) and "3 enlarged" in store.describe()
    assert {store.names[n] for n in store.indices("test")} <= set(large) and store.names[store.indices("train")[0]] == trained[0]
    expected = picture(0, 120, 150).resize((178, round(150 * 178 / 120)), Image.BICUBIC)
    assert np.array_equal(pixels(store)[store.names.index(small[0])], np.asarray(expected)[22:200])


PORTRAITS = [(f"set-1/images/{name}.png", encoded(n)) for n, name in enumerate("ab")]


def test_a_drawn_face_is_a_function_of_its_number_in_every_store(store, tmp_path):
    for drawn, index in itertools.product((store, srgan.prepare("synthetic", tmp_path / "store", limit=6)), (0, 3, -1)):
        face = srgan.synthetic_face(int(drawn.names[index][10:16]))
        assert (drawn.faces([index]).float() / 255 - face).abs().max() < 1e-6
        assert all((face - srgan.synthetic_face(5, seed)).abs().mean() > 0.02 for seed in (0, 1))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """An empty folder to work in, an empty cache, portraits that a file may hold, and faces that are drawn in no time."""
    monkeypatch.setattr(srgan, "synthetic_face", lambda index: torch.zeros(1, 3, 178, 178))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    lines = "".join(f"{hashlib.sha256(data).hexdigest()}  {name[-5:]}\n" for name, data in PORTRAITS)
    pinned = {"folder": "set-1/images/", "sha256": hashlib.sha256(lines.encode()).hexdigest()}
    monkeypatch.setattr(srgan, "_PORTRAITS", pinned | {"url": (tmp_path / "served.zip").as_uri()})  # which `urlopen` understands
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return SimpleNamespace(served=tmp_path / "served.zip", cache=tmp_path / "cache" / "hub" / "srgan")


def test_what_cannot_be_had_is_replaced_by_drawn_faces_loudly_but_never_a_users_own_path(machine, capsys):
    for limit, drawn in ((1, [1, 1, 1]), (34, [34, 2, 4]), (None, [200, 12, 24]), (900, [200, 12, 24])):  # enough for each part
        store, told = srgan.prepare_faces("portraits", limit), capsys.readouterr().out
        assert store.source == "synthetic" and np.bincount(store.split).tolist() == drawn
        assert "could not be fetched" in told and "SYNTHETIC (drawn) faces instead of portraits:" in told and "!" * 40 in told
    Path("empty").mkdir()
    Path("page.zip").write_text("<html>")
    for path in ("portrait", "empty", "page.zip", Path("celeba").absolute()):
        with pytest.raises((OSError, ValueError)):
            srgan.prepare_faces(path)
    folder_of(Path("portraits"), ["mine.png"])
    assert srgan.prepare_faces("./portraits").names == ["mine.png"]  # their folder, not the set of that name
    assert "SYNTHETIC" not in capsys.readouterr().out


def test_portraits_are_fetched_once_and_anew_only_where_the_copy_is_spoilt(machine):
    zip_of(machine.served, [("set-1/README.md", b"no face"), *PORTRAITS])
    store = srgan.prepare("portraits", "store")
    assert [name[-5:] for name in store.names] == ["a.png", "b.png"] and np.array_equal(pixels(store)[1], np.asarray(picture(1)))
    zip_of(machine.served, [("set-1/images/", b""), *PORTRAITS[::-1]], zipfile.ZIP_DEFLATED)  # other bytes, the same pictures
    (copy,) = machine.cache.glob("*.zip")
    for data, fetched in ((copy.read_bytes(), False), (copy.read_bytes()[:-300], True)):
        copy.write_bytes(data)
        assert srgan.prepare("portraits", f"fetched-{fetched}").fingerprint == store.fingerprint
        assert (copy.read_bytes() == machine.served.read_bytes()) == fetched


@pytest.mark.parametrize("serve, error", {
    "other pixels": (lambda path: zip_of(path, [(name, data[:-20] + bytes(20)) for name, data in PORTRAITS]), None),
    "one fewer": (lambda path: zip_of(path, PORTRAITS[1:]), None), "web page": (lambda path: path.write_text("<html>"), None),
    "not there": (str, None), "too late": (str, TimeoutError("timed\nout")), "cut off": (str, http.client.IncompleteRead(b"")),
    "no http": (str, http.client.BadStatusLine("SSH\r\n")),
}.values())
def test_what_is_not_the_portraits_is_refused_in_one_line_and_not_kept(machine, monkeypatch, serve, error):
    serve(machine.served)
    if error:
        reply = mock.MagicMock(headers={"Content-Length": "9"}, **{"__enter__.return_value.read.side_effect": [b"PK", error]})
        monkeypatch.setattr("urllib.request.urlopen", lambda *_, timeout: reply)
    refused("portraits could not be fetched .*'synthetic'", srgan.prepare, "portraits", "store", error=ConnectionError)
    assert not list(machine.cache.glob("*.zip")) and not Path("store").exists()


@pytest.fixture
def celeba(machine, tmp_path, monkeypatch):
    """A stand-in for CelebA's zip, and mirrors that fail where `gives` has nothing; `asked` says which were tried."""
    gdown, data, asked, gives = pytest.importorskip("gdown"), zip_of(tmp_path / "zip", CELEBA).read_bytes(), [], {}
    monkeypatch.setitem(srgan._CELEBA, "md5", hashlib.md5(data).hexdigest())

    def fetch(mirror, target, known):
        asked.append(mirror)
        assert known and not (mirror == "Google Drive" and Path(target).exists())  # what is there, gdown may take for whole
        if mirror not in gives:
            raise RuntimeError(f"{mirror} failed:\n\n\tToo many users have viewed or downloaded this file recently.")
        Path(target).write_bytes(gives[mirror])

    def hub(repository, name, *, repo_type, local_dir):
        fetch("Hugging Face", Path(local_dir, name), "celeb" in repository.lower() and repo_type == "dataset")

    drive = mock.create_autospec(gdown.download)
    drive.side_effect = lambda *, id, output, **_: fetch("Google Drive", output, id == "0B7EVK8r0v71pZjFTYXZWM3FlRnM")
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=hub))
    monkeypatch.setattr(gdown, "download", drive)
    return SimpleNamespace(data=data, asked=asked, gives=gives, copy=machine.cache / "img_align_celeba.zip")


@pytest.mark.parametrize("place", [".", "celeba", "img_align_celeba", "celeba/img_align_celeba", "img_align_celeba/" * 2])
def test_celeba_that_is_there_is_used_and_keeps_its_official_partition_whatever_lists_lie_beside_it(celeba, place):
    pictures = [name[-10:] for name in CELEBA] if "img" in place else []
    folder_of(Path(place), pictures), Path(place).mkdir(exist_ok=True)
    for name, data in [("list.csv", b"a"), ("README.txt", b"a")] if pictures else [(celeba.copy.name, celeba.data)]:
        Path(place, name).write_bytes(data)
    for limit, parts in ((None, [0, 0, 1, 1, 2, 2]), (1, [0, 1, 2])):
        store = srgan.prepare("celeba", f"{limit}", limit)
        assert (store.source, store.split.tolist(), celeba.asked) == ("celeba", parts, [])
    assert srgan.split_of([*CELEBA, "list.csv", "README.txt"]).tolist()[:6] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("gives, asked", [("R", "H"), ("WR", "HG"), ("-R", "HG"), ("?R", "G"), ("WW", "HG"), ("--", "HG")])
def test_celeba_is_fetched_from_one_mirror_or_the_other_and_checked_or_there_is_advice(celeba, monkeypatch, capsys, gives, asked):
    """R: the right zip, W: a wrong one, -: an error, ?: no such package."""
    wrong = Path("img_align_celeba.zip").absolute()  # a user's own: it is passed over, and kept
    wrong.write_bytes(celeba.data[:-10] if "-" in gives else celeba.data[:500] + bytes(10) + celeba.data[510:])
    if "W" in gives:
        celeba.copy.parent.mkdir(parents=True)
        celeba.copy.write_bytes(b"a download that was cut off before")
    for mirror, what in zip(("Hugging Face", "Google Drive"), gives):
        celeba.gives.update({"R": {mirror: celeba.data}, "W": {mirror: b"404"}}.get(what, {}))
    if "?" in gives:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # import then raises ImportError
    before = wrong.read_bytes()
    if "R" in gives:
        for folder in ("store", "other"):  # for the second it is found in the cache
            assert len(srgan.prepare("celeba", folder)) == 6
    else:
        with pytest.raises(ConnectionError, match=r"\n  1\. .*https://.*\n  2\. .*MyDrive/srgan.*\n  3\. "):
            srgan.prepare("celeba", "store")
    told = capsys.readouterr().out
    assert [mirror[0] for mirror in celeba.asked] == list(asked) and wrong.read_bytes() == before and str(wrong) in told
    assert told.count("failed: Too many") == gives.count("-")
    assert all(line.startswith(("CelebA: ", "/")) for line in told.splitlines())  # whatever a client says


def test_each_epoch_visits_each_face_once_in_another_order(store):
    members, epochs = store.indices("train"), []
    for seed in (0, 1):
        config = srgan.Config(hr_size=32, patch_size=None, flip=False, batch_size=4, seed=seed)
        _, wholes = srgan.make_pair(store.faces(members), config)
        faces = torch.cat([srgan.batch(store, config, update, CPU)[1] for update in range(len(members))])
        epochs += np.reshape([int((wholes == face).flatten(1).all(1).nonzero()) for face in faces], (4, len(members))).tolist()
    assert all(sorted(epoch) == list(range(len(members))) for epoch in epochs) and len(set(map(tuple, epochs))) == 8


def test_a_batch_is_a_function_of_seed_and_update_alone_and_a_share_is_its_part(store, tmp_path):
    config, state = srgan.Config(**SMALL), torch.get_rng_state()
    first = [srgan.batch(store, config, update, CPU) for update in range(3)]
    assert torch.equal(torch.get_rng_state(), state)  # torch's own generator is neither used nor moved
    torch.manual_seed(1)
    for update in (2, 0, 1):
        shares = [srgan.batch(store, config, update, CPU, (rank, 2)) for rank in (0, 1)]
        for again, parts, whole in zip(srgan.batch(store, config, update, CPU), zip(*shares), first[update]):
            assert torch.equal(again, whole) and torch.equal(torch.cat(parts), whole)
    one = srgan.prepare("synthetic", tmp_path / "store", limit=1)  # the same face each time: flips and cuts
    cuts = [srgan.batch(one, srgan.Config(**SMALL, seed=seed), update, CPU)[1] for seed in (0, 1) for update in (0, 1)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(cuts, 2))


@pytest.mark.parametrize("scale, crop, flip", [(2, 176, True), (4, 178, True), (8, 145, True), (4, 144, False)])
def test_patches_and_flips_are_in_step(store, scale, crop, flip):
    """Every (lr, hr) patch is one place of one whole training face, mirrored or not, cut from both."""
    small, config = 16 // scale, srgan.Config(scale=scale, crop=crop, flip=flip, **SMALL)
    faces = store.faces(store.indices("train"))
    wholes = map(torch.stack, zip(srgan.make_pair(faces, config), srgan.make_pair(faces.flip(-1), config)))  # of lr, of hr
    windows = [whole.unfold(3, side, step).unfold(4, side, step) for whole, side, step in zip(wholes, (small, 16), (1, scale))]
    found = []
    for patches in (srgan.batch(store, config, update, CPU) for update in range(5)):
        assert [patch.shape for patch in patches] == [(4, 3, small, small), (4, 3, 16, 16)]
        for pair in zip(*patches):  # windows: (mirrored, face, channel, row, column, y, x)
            here = [((each - one[:, None, None]).abs() < 1e-3).flatten(-2).all(-1).all(2) for each, one in zip(windows, pair)]
            (place,) = (here[0] & here[1]).nonzero().tolist()
            found.append(place)
    mirrored = {place[0] for place in found}
    assert mirrored == ({0, 1} if flip else {0}) and len({tuple(place[2:]) for place in found}) > 3


@pytest.mark.parametrize("crop, hr_size, scale", [(176, 176, 4), (178, 128, 8), (144, 256, 4), (178, 176, 2)])
def test_a_pair_is_the_centre_crop_and_its_reduction_at_8_bit_levels(store, crop, hr_size, scale):
    faces, inner = store.faces([0, 1]), slice((178 - crop) // 2, (178 - crop) // 2 + crop)
    whole = srgan.quantise(srgan.bicubic(faces[..., inner, inner] / 255, hr_size))  # which test_pixels.py holds to Pillow's
    lr, hr = srgan.make_pair(faces, srgan.Config(crop=crop, hr_size=hr_size, scale=scale))
    assert torch.equal(hr, whole) and torch.equal(lr, srgan.quantise(srgan.bicubic(whole, hr_size // scale)))


def test_faces_kept_on_a_device_are_read_from_there(store, tmp_path):
    kept = srgan.FaceStore(shutil.copytree(store.folder, tmp_path / "copy"))
    kept.keep_on(CPU)
    (tmp_path / "copy" / "faces.u8").write_bytes(bytes(len(store) * 178 * 178 * 3))  # black, from now on
    assert torch.equal(kept.faces(range(len(store)), CPU), store.faces(range(len(store))))
    kept.keep_on(None)
    assert not kept.faces(range(len(store)), CPU).any()
