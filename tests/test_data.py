"""Data: sources, the store, the split, batches, uploads."""

import hashlib
import http.server
import io
import itertools
import json
import os
import shutil
import socket
import sys
import threading
import zipfile
import zlib
from datetime import datetime
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import srgan_utils as srgan

CPU = torch.device("cpu")


def picture(number: int, width: int = 178, height: int = 178) -> Image.Image:
    """A picture that no other number has: smooth, cheap, in colour."""
    y, x = np.mgrid[:height, :width]
    waves = [120 + 100 * np.sin((x * (number % 5 + 1) + y * channel) / 25 + number) for channel in (1, 2, 3)]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8))


def folder_of(folder, names, **size):
    """A folder of different pictures under `names`, which may hold folders."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number, **size).save(folder / name)
    return folder


def bucket(name: str) -> int:
    """What decides the part of a face outside CelebA."""
    return zlib.crc32(name.rsplit("/", 1)[-1].encode("utf-8")) % 100


def names_in(low: int, high: int, count: int, ending: str = "png") -> list[str]:
    """Sorted names whose bucket is in [low, high)."""
    names = (f"face-{number}.{ending}" for number in itertools.count())
    return sorted(itertools.islice((name for name in names if low <= bucket(name) < high), count))


def stored(store, index: int) -> np.ndarray:
    return store.faces([index])[0].permute(1, 2, 0).numpy()


# --- Folders and zips


def test_a_nested_folder_becomes_a_store_of_centre_squares(tmp_path):
    source = folder_of(tmp_path / "in", ["b/c/two.png", "b/one.png", "a.png"])
    picture(7, 178, 218).save(source / "tall.png")     # CelebA's size: no pixel is resampled
    picture(8, 400, 300).save(source / "wide.png")
    (source / "b" / ".DS_Store").write_bytes(b"litter")
    (source / "__MACOSX").mkdir()
    (source / "__MACOSX" / "._a.png").write_bytes(b"litter")
    store = srgan.prepare(source, tmp_path / "store")
    assert store.names == ["a.png", "b/c/two.png", "b/one.png", "tall.png", "wide.png"]
    assert len(store) == 5 and not store.left_out and not store.enlarged
    assert np.array_equal(stored(store, 1), np.asarray(picture(0)))
    assert np.array_equal(stored(store, 3), np.asarray(picture(7, 178, 218))[20:198])
    small = picture(8, 400, 300).resize((237, 178), Image.BICUBIC)
    assert np.array_equal(stored(store, 4), np.asarray(small)[:, 29:207])


def test_a_zip_gives_the_same_store_as_the_folder(tmp_path):
    source = folder_of(tmp_path / "in", ["a/one.png", "two.png", "b/three.png"])
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for name in ("two.png", "b/three.png", "a/one.png"):
            archive.write(source / name, name)
        archive.writestr("a/", "")
        archive.writestr("__MACOSX/a/._one.png", "litter")
    one, other = srgan.prepare(source, tmp_path / "one"), srgan.prepare(tmp_path / "in.zip", tmp_path / "other")
    assert (other.names, other.fingerprint, other.split.tolist()) == (one.names, one.fingerprint, one.split.tolist())
    assert (tmp_path / "one" / "faces.u8").read_bytes() == (tmp_path / "other" / "faces.u8").read_bytes()


def test_the_fingerprint_covers_names_and_pixels(tmp_path):
    source = folder_of(tmp_path / "in", ["a.png", "b.png"])
    first = srgan.prepare(source, tmp_path / "1").fingerprint
    picture(9).save(source / "b.png")
    second = srgan.prepare(source, tmp_path / "2").fingerprint
    (source / "b.png").rename(source / "c.png")
    assert len({first, second, srgan.prepare(source, tmp_path / "3").fingerprint}) == 3


def test_what_cannot_be_used_is_left_out_counted_and_named(tmp_path):
    source = folder_of(tmp_path / "in", ["good.png", "x/fine.png"])
    (source / "notes.txt").write_text("not an image")
    (source / "cut.png").write_bytes((source / "good.png").read_bytes()[:2000])
    picture(1, 63, 200).save(source / "small.png")
    picture(1, 64, 64).save(source / "smallest.png")
    picture(1, 900, 100).save(source / "strip.png")
    store = srgan.prepare(source, tmp_path / "store")
    assert store.names == ["good.png", "smallest.png", "x/fine.png"]
    reasons = dict(store.left_out)
    assert list(reasons) == ["cut.png", "notes.txt", "small.png", "strip.png"]
    for name, why in zip(reasons, ["truncated", "not an image", "63 x 200", "narrow"]):
        assert why in reasons[name]
    assert store.enlarged == ["smallest.png"]
    assert "4 left out" in store.describe() and "1 enlarged" in store.describe()
    assert srgan.FaceStore(tmp_path / "store").left_out == store.left_out


def test_odd_kinds_of_image_are_stored_as_they_are_seen(tmp_path):
    source, exif = tmp_path / "in", Image.Exif()
    source.mkdir()
    exif[274] = 6
    picture(1).convert("L").save(source / "grey.png")
    picture(2).quantize(16).save(source / "palette.png")
    picture(3).convert("CMYK").save(source / "cmyk.jpg")
    picture(4).save(source / "turned.png", exif=exif)
    Image.merge("RGBA", [*picture(5).split(), picture(6).getchannel(0)]).save(source / "alpha.png")
    Image.fromarray(np.asarray(picture(7).convert("L"), dtype=np.uint16) * 257).save(source / "sixteen.png")
    store = srgan.prepare(source, tmp_path / "store")
    assert len(store) == 6
    for index, name in enumerate(store.names):
        seen = srgan.load_image(source / name)
        torch.testing.assert_close(store.faces([index]).float() / 255, seen, rtol=0, atol=1e-6)


def empty_folder(folder):
    (folder / "in").mkdir()
    return folder / "in"


def empty_zip(folder):
    zipfile.ZipFile(folder / "in.zip", "w").close()
    return folder / "in.zip"


def not_a_zip(folder):
    (folder / "in.zip").write_text("<html>Sign in</html>")
    return folder / "in.zip"


def half_a_zip(folder):
    with zipfile.ZipFile(folder / "in.zip", "w") as archive:
        archive.writestr("a.png", b"x" * 5000)
    (folder / "in.zip").write_bytes((folder / "in.zip").read_bytes()[:2500])
    return folder / "in.zip"


def no_image(folder):
    (empty_folder(folder) / "a.txt").write_text("a")
    return folder / "in"


@pytest.mark.parametrize("make, error, message", [
    (lambda folder: folder / "nowhere", FileNotFoundError, "no such source"), (empty_folder, ValueError, "is empty"),
    (empty_zip, ValueError, "holds no files"), (not_a_zip, ValueError, "not a zip"), (half_a_zip, ValueError, "cut off"),
    (no_image, ValueError, "no usable image .1 left out: a.txt: not an image"),
])
def test_a_source_without_faces_is_an_error(tmp_path, make, error, message):
    with pytest.raises(error, match=message):
        srgan.prepare(make(tmp_path), tmp_path / "store")
    with pytest.raises(FileNotFoundError, match="holds no prepared faces"):
        srgan.FaceStore(tmp_path / "store")


def test_a_source_that_was_mended_is_read_again(tmp_path):
    source = no_image(tmp_path)
    (source / "a.png").write_bytes(b"not yet")
    with pytest.raises(ValueError, match="no usable image"):
        srgan.prepare(source, tmp_path / "store")
    picture(1).save(source / "a.png")
    assert srgan.prepare(source, tmp_path / "store").names == ["a.png"]


# --- Preparing again, and after an interruption


@pytest.fixture
def decoded(monkeypatch):
    """The names that are decoded, in blocks of 4; a name in `decoded.stop` interrupts instead."""
    names, square, lock = [], srgan._square, threading.Lock()
    log = SimpleNamespace(names=names, stop=set())

    def watched(source, name):
        if name in log.stop:
            raise KeyboardInterrupt
        with lock:
            names.append(name)
        return square(source, name)

    monkeypatch.setattr(srgan, "_square", watched)
    monkeypatch.setattr(srgan, "_BLOCK", 4)
    return log


@pytest.mark.parametrize("tail", ["", '{"names": ["05.png"'], ids=["clean", "half-written"])
def test_an_interrupted_preparation_continues(tmp_path, decoded, tail):
    names = [f"{number:02}.png" for number in range(10)]
    source = folder_of(tmp_path / "in", names)
    (source / "02.png").write_bytes(b"bad")
    srgan.prepare(source, tmp_path / "whole")
    decoded.stop, decoded.names[:] = {"06.png"}, []
    with pytest.raises(KeyboardInterrupt):
        srgan.prepare(source, tmp_path / "store")
    assert set(names[:4]) <= set(decoded.names)
    with open(tmp_path / "store" / "journal.jsonl", "a") as journal:
        journal.write(tail)
    decoded.stop, decoded.names[:] = set(), []
    store = srgan.prepare(source, tmp_path / "store")
    assert sorted(decoded.names) == names[4:]
    for file in ("store.json", "faces.u8"):
        assert (tmp_path / "store" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    blocks = json.loads((tmp_path / "store" / "store.json").read_text())["blocks"]
    assert len(store) == 9 and [rows for rows, _ in blocks] == [3, 4, 2]
    assert not (tmp_path / "store" / "journal.jsonl").exists()


def test_another_source_does_not_continue_an_interrupted_one(tmp_path, decoded):
    names = [f"{number:02}.png" for number in range(6)]
    source, other = folder_of(tmp_path / "in", names), folder_of(tmp_path / "other", reversed(names))
    decoded.stop = {"05.png"}
    with pytest.raises(KeyboardInterrupt):
        srgan.prepare(source, tmp_path / "store")
    decoded.stop = set()
    assert srgan.prepare(other, tmp_path / "store").fingerprint == srgan.prepare(other, tmp_path / "fresh").fingerprint


@pytest.mark.parametrize("spelled", [str, lambda path: path, lambda path: f"{path}/"], ids=["text", "path", "slash"])
def test_a_second_call_does_nothing(tmp_path, decoded, spelled):
    source = folder_of(tmp_path / "in", ["a.png", "b.png"])
    first = srgan.prepare(source, tmp_path / "store")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "store").iterdir()}
    decoded.names.clear()
    second = srgan.prepare(spelled(source), tmp_path / "store")
    assert second.fingerprint == first.fingerprint and decoded.names == []
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "store").iterdir()} == before


def test_a_finished_store_takes_no_other_source_or_limit(tmp_path):
    source = folder_of(tmp_path / "in", ["a.png", "b.png"])
    other = folder_of(tmp_path / "other", ["c.png"])
    fingerprint = srgan.prepare(source, tmp_path / "store").fingerprint
    for arguments in ((other, None), (source, 1)):
        with pytest.raises(ValueError, match="already holds"):
            srgan.prepare(arguments[0], tmp_path / "store", limit=arguments[1])
    assert srgan.FaceStore(tmp_path / "store").fingerprint == fingerprint


# --- A store on disk


def test_a_damaged_block_is_noticed_at_its_first_use(tmp_path, decoded):
    source = folder_of(tmp_path / "in", [f"{number:02}.png" for number in range(12)])
    for number in range(4):
        (source / f"{number:02}.png").write_text("a block with no usable face")
    srgan.prepare(source, tmp_path / "store")
    with open(tmp_path / "store" / "faces.u8", "r+b") as file:
        file.seek(5 * 178 * 178 * 3 + 1000)  # the second face of the second block that holds faces
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    store = srgan.FaceStore(tmp_path / "store")
    assert np.array_equal(stored(store, 3), np.asarray(picture(7)))
    for read in (lambda: store.faces([4]), lambda: store.faces([0, 7]), store.verify,
                 lambda: srgan.prepare(source, tmp_path / "store")):
        with pytest.raises(ValueError, match="faces 4 to 7 are damaged"):
            read()


@pytest.mark.parametrize("spoil, message", [
    (lambda record: record | {"format": record["format"] + 1}, "newer version"),
    (lambda record: record | {"split": [2 - part for part in record["split"]]}, "damaged"),
    (lambda record: record | {"names": record["names"][1:]}, "damaged"),
    (lambda record: {key: value for key, value in record.items() if key != "blocks"}, "damaged"),
    (lambda record: record | {"format": "two"}, "damaged"),
    (lambda record: [record], "damaged"),
], ids=["newer", "split", "names", "no blocks", "odd format", "no object"])
def test_a_spoilt_store_is_refused_in_one_line(tmp_path, spoil, message):
    source = folder_of(tmp_path / "in", ["a.png", "b.png", "c.png"])
    srgan.prepare(source, tmp_path / "store")
    path = tmp_path / "store" / "store.json"
    path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=message):
        srgan.FaceStore(tmp_path / "store")
    with pytest.raises(ValueError, match=message):
        srgan.prepare(source, tmp_path / "store")


def test_a_shortened_store_is_refused(tmp_path):
    srgan.prepare(folder_of(tmp_path / "in", ["a.png", "b.png"]), tmp_path / "store")
    pixels = tmp_path / "store" / "faces.u8"
    pixels.write_bytes(pixels.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"):
        srgan.FaceStore(tmp_path / "store")


# --- Split and limit


def test_the_split_is_crc32_of_the_base_name():
    names = [f"folder/{kind}-{number}.jpg" for kind in ("é", "face") for number in range(400)]
    parts = srgan.split_of(names)
    assert parts.tolist() == [0 if bucket(name) < 85 else 1 if bucket(name) < 90 else 2 for name in names]
    assert set(parts.tolist()) == {0, 1, 2}
    assert srgan.split_of([name.removeprefix("folder/") for name in names]).tolist() == parts.tolist()


CELEBA_ENDS = ["000001.jpg", "162770.jpg", "162771.jpg", "182637.jpg", "182638.jpg", "202599.jpg"]


def test_celeba_keeps_its_official_partition():
    assert srgan.split_of(CELEBA_ENDS).tolist() == [0, 0, 1, 1, 2, 2]
    assert srgan.split_of([f"img_align_celeba/{name}" for name in CELEBA_ENDS]).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("names", [
    CELEBA_ENDS[:2] + CELEBA_ENDS[4:], CELEBA_ENDS[2:], CELEBA_ENDS[:4], CELEBA_ENDS + ["mine.jpg"],
    [name.replace("jpg", "png") for name in CELEBA_ENDS], [f"{number:06}.jpg" for number in range(1, 200)],
], ids=["no validation", "no train", "no test", "one more", "png", "first 199"])
def test_other_sets_with_numbers_are_split_as_any_other(names):
    assert srgan.split_of(names).tolist() == [0 if bucket(name) < 85 else 1 if bucket(name) < 90 else 2 for name in names]


@pytest.mark.parametrize("limit", [34, 100, 1, 5_000])
def test_limit_takes_so_many_of_each_part_spread_evenly(limit):
    names = sorted(f"{number:04}.png" for number in range(3_000))
    parts = dict(zip(names, srgan.split_of(names).tolist()))
    kept = srgan._limited(names, limit)
    assert kept == sorted(set(kept))
    for part, wanted in enumerate([limit, limit / 17, 2 * limit / 17]):
        members = [name for name in names if parts[name] == part]
        places = [members.index(name) for name in kept if parts[name] == part]
        assert len(places) == min(max(1, round(wanted)), len(members))
        gaps = np.diff([*places, places[0] + len(members)])  # around the end
        assert gaps.max() - gaps.min() <= 1
    assert srgan._limited(names, None) == names


@pytest.mark.parametrize("limit", [1, 34, 60, 360])
def test_synthetic_has_enough_faces_for_each_part(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(srgan, "_square", lambda source, name: (np.zeros((178, 178, 3), np.uint8), "", False))  # nothing is drawn
    store = srgan.prepare("synthetic", tmp_path / "store", limit=limit)
    wanted = [limit, max(1, round(limit / 17)), max(1, round(2 * limit / 17))]
    assert [len(store.indices(part)) for part in ("train", "validation", "test")] == wanted
    parts = np.concatenate([store.indices(part) for part in ("train", "validation", "test")])
    assert sorted(parts) == store.indices("all").tolist() == list(range(sum(wanted)))


def test_enlarged_faces_are_not_in_test(tmp_path):
    small, large = names_in(90, 100, 4)[:2], names_in(90, 100, 4)[2:]
    trained = names_in(0, 85, 1)
    source = folder_of(tmp_path / "in", small + trained, width=120, height=150)
    folder_of(source, large)
    store = srgan.prepare(source, tmp_path / "store")
    assert sorted(store.enlarged) == sorted(small + trained)
    assert sorted(store.names[index] for index in store.indices("test")) == large
    assert [store.names[index] for index in store.indices("train")] == trained
    expected = picture(0, 120, 150).resize((178, round(150 * 178 / 120)), Image.BICUBIC)
    assert np.array_equal(stored(store, store.names.index(small[0])), np.asarray(expected)[22:200])


def test_a_part_that_is_needed_and_empty_is_an_error_in_one_line(tmp_path):
    store = srgan.prepare(folder_of(tmp_path / "in", names_in(0, 85, 2)), tmp_path / "store")
    for part in ("validation", "test"):
        with pytest.raises(ValueError, match=f"no {part} faces .2 train, 0 validation, 0 test") as caught:
            store.indices(part)
        assert "\n" not in str(caught.value)


# --- Synthetic faces


def test_a_synthetic_face_is_a_function_of_its_number(store):
    for index in (0, 17, len(store) - 1):
        number = int(store.names[index].removeprefix("synthetic-").removesuffix(".png"))
        torch.testing.assert_close(store.faces([index]).float() / 255, srgan.synthetic_face(number), rtol=0, atol=1e-6)
    assert torch.equal(srgan.synthetic_face(3), srgan.synthetic_face(3))
    assert (srgan.synthetic_face(3) - srgan.synthetic_face(4)).abs().mean() > 0.02
    assert (srgan.synthetic_face(3) - srgan.synthetic_face(3, seed=1)).abs().mean() > 0.02


def test_synthetic_stores_of_another_size_hold_the_same_faces(store, tmp_path):
    other = srgan.prepare("synthetic", tmp_path / "store", limit=6)
    assert other.indices("train").size == 6 and not other.left_out and not other.enlarged
    common = sorted(set(store.names) & set(other.names))
    assert common
    for name in common:
        assert torch.equal(store.faces([store.names.index(name)]), other.faces([other.names.index(name)]))


# --- Portraits: a download from a server of our own


@pytest.fixture
def portraits(tmp_path, monkeypatch):
    """`portraits(reply)` serves bytes as the pinned zip; `.zip` is the right one, with two faces."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("set-1/README.md", "not a face")
        for number, name in enumerate(["b.png", "a.png"]):
            data = io.BytesIO()
            picture(number, 225, 275).save(data, "PNG")
            archive.writestr(f"set-1/images/{name}", data.getvalue())
    with zipfile.ZipFile(buffer) as archive:
        faces = {name: archive.read(f"set-1/images/{name}") for name in ("a.png", "b.png")}
    lines = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in faces.items())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("no_proxy", "*")
    servers = []

    def serve(reply: bytes, headers: dict | None = None, size: int | None = None):
        requests = []

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                requests.append(self.path)
                self.close_connection = True
                if headers is None:
                    self.send_response(200)
                    self.send_header("Content-Length", str(size or len(reply)))
                    self.end_headers()
                elif headers:
                    self.send_response(200)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        monkeypatch.setitem(srgan._PORTRAITS, "url", f"http://127.0.0.1:{server.server_port}/faces.zip")
        return requests

    for key, value in {"folder": "set-1/images/", "files": 2, "bytes": sum(map(len, faces.values())),
                       "sha256": hashlib.sha256(lines.encode()).hexdigest()}.items():
        monkeypatch.setitem(srgan._PORTRAITS, key, value)
    serve.zip, serve.cache = buffer.getvalue(), tmp_path / "cache"
    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_portraits_are_fetched_once_checked_and_prepared(portraits, tmp_path):
    requests = portraits(portraits.zip)
    store = srgan.prepare("portraits", tmp_path / "store")
    assert [name.rsplit("/", 1)[-1] for name in store.names] == ["a.png", "b.png"]
    expected = picture(1, 225, 275).resize((178, 218), Image.BICUBIC)
    assert np.array_equal(stored(store, 0), np.asarray(expected)[20:198])
    assert srgan.prepare("portraits", tmp_path / "other").fingerprint == store.fingerprint
    assert requests == ["/faces.zip"]


def test_a_spoilt_copy_of_the_portraits_is_fetched_anew(portraits, tmp_path):
    portraits(portraits.zip)
    srgan.open_source("portraits")
    (copy,) = portraits.cache.rglob("*.zip")
    copy.write_bytes(portraits.zip[:-300])
    requests = portraits(portraits.zip)
    assert len(srgan.open_source("portraits").names) == 2 and requests == ["/faces.zip"]


def other_zip(data: bytes) -> bytes:
    """A zip of the same names and sizes, with other pixels."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(buffer, "w") as copy:
        for info in archive.infolist():
            content = archive.read(info)
            copy.writestr(info.filename, content[:-20] + bytes(20))
    return buffer.getvalue()


@pytest.mark.parametrize("reply, headers, size", [
    (other_zip, None, None),
    (lambda data: b"<html>Please sign in to this network</html>", None, None),
    (lambda data: data[:-500], None, None),
    (lambda data: data[:-500], None, 10**6),                                                 # the connection breaks
    (lambda data: b"fff\r\n" + data[:500], {"Transfer-Encoding": "chunked"}, None),          # so it does here
    (lambda data: b"SSH-2.0-OpenSSH_9.6\r\n", {}, None),                                     # not even HTTP
], ids=["other pixels", "web page", "cut off", "cut off early", "cut off in a chunk", "no http"])
def test_what_is_not_the_portraits_is_refused_and_not_kept(portraits, tmp_path, monkeypatch, reply, headers, size):
    escaped = []
    monkeypatch.setattr(threading, "excepthook", escaped.append)  # else a thread's traceback lands on standard error
    monkeypatch.setattr(srgan.time, "sleep", lambda seconds: None)  # the pauses before a broken download is taken up
    portraits(reply(portraits.zip), headers, size)
    with pytest.raises((ValueError, ConnectionError), match="portraits.*'synthetic'") as caught:
        srgan.prepare("portraits", tmp_path / "store")
    assert "\n" not in str(caught.value) and not escaped
    assert not list(portraits.cache.rglob("*.zip")) and not (tmp_path / "store").exists()
    requests = portraits(portraits.zip)
    assert len(srgan.prepare("portraits", tmp_path / "store")) == 2 and requests


def test_no_answer_is_a_connection_error_with_advice(portraits, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setitem(srgan._PORTRAITS, "url", f"http://127.0.0.1:{port}/faces.zip")
    with pytest.raises(ConnectionError, match="check the network, or use the source 'synthetic'"):
        srgan.open_source("portraits")


# --- CelebA: what lies there, then the mirrors, then advice


class HfHubHTTPError(OSError):
    """As huggingface_hub raises it."""


class FileURLRetrievalError(Exception):
    """As gdown raises it when Google's quota is used up."""


@pytest.fixture
def celeba(tmp_path, monkeypatch):
    """An empty folder to work in, a stand-in for CelebA's zip, and mirrors that all fail; `.asked` says which were tried."""
    with zipfile.ZipFile(tmp_path / "right.zip", "w") as archive:
        for number, name in enumerate(CELEBA_ENDS):
            data = io.BytesIO()
            picture(number, 178, 218).save(data, "JPEG")
            archive.writestr(f"img_align_celeba/{name}", data.getvalue())
    data = (tmp_path / "right.zip").read_bytes()
    monkeypatch.setitem(srgan._CELEBA, "bytes", len(data))
    monkeypatch.setitem(srgan._CELEBA, "md5", hashlib.md5(data).hexdigest())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    import gdown

    asked = []

    def failing(mirror, error):
        def fetch(*_, **__):
            asked.append(mirror)
            raise error

        return fetch

    hub, kaggle = ModuleType("huggingface_hub"), ModuleType("kagglehub")
    hub.hf_hub_download = failing("Hugging Face", HfHubHTTPError("401 Client Error.\n\nRepository Not Found"))
    kaggle.dataset_download = failing("Kaggle", RuntimeError("403 Client Error."))
    drive = mock.create_autospec(gdown.download, side_effect=failing("Google Drive", FileURLRetrievalError(
        "Failed to retrieve file url:\n\n\tToo many users have viewed or downloaded this file recently.")))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "kagglehub", kaggle)
    monkeypatch.setattr(gdown, "download", drive)
    return SimpleNamespace(data=data, asked=asked, here=tmp_path / "here", cache=tmp_path / "cache" / "hub" / "srgan",
                           hub=hub, kaggle=kaggle, gdown=drive)


def test_celeba_in_the_current_folder_is_used_as_it_is(celeba, tmp_path):
    (celeba.here / "img_align_celeba.zip").write_bytes(celeba.data)
    store = srgan.prepare("celeba", tmp_path / "store")
    assert [name.rsplit("/", 1)[-1] for name in store.names] == CELEBA_ENDS
    assert store.split.tolist() == [0, 0, 1, 1, 2, 2] and celeba.asked == []


@pytest.mark.parametrize("folder", ["img_align_celeba", "img_align_celeba/img_align_celeba", "celeba/img_align_celeba"])
def test_celeba_as_a_folder_is_found(celeba, folder):
    target = celeba.here / folder
    with zipfile.ZipFile(io.BytesIO(celeba.data)) as archive:
        archive.extractall(celeba.here / "unpacked")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(celeba.here / "unpacked" / "img_align_celeba", target)
    source = srgan.open_source("celeba")
    assert source.names == CELEBA_ENDS and source.read("000001.jpg").size == (178, 218) and celeba.asked == []


@pytest.mark.parametrize("spoil", [lambda data: data[:-10], lambda data: data[:500] + bytes(10) + data[510:]],
                         ids=["size", "md5"])
def test_a_wrong_celeba_zip_is_passed_over_and_kept(celeba, capsys, spoil):
    path, wrong = celeba.here / "img_align_celeba.zip", spoil(celeba.data)
    path.write_bytes(wrong)
    with pytest.raises(ConnectionError):
        srgan.open_source("celeba")
    assert celeba.asked == ["Hugging Face", "Kaggle", "Google Drive"] and path.read_bytes() == wrong
    assert str(path) in capsys.readouterr().out


def test_mirrors_are_tried_in_order_and_then_there_is_advice(celeba, capsys):
    with pytest.raises(ConnectionError) as caught:
        srgan.open_source("celeba")
    assert celeba.asked == ["Hugging Face", "Kaggle", "Google Drive"]
    steps = [line.strip() for line in str(caught.value).splitlines()][-3:]
    assert [step[:2] for step in steps] == ["1.", "2.", "3."]
    assert "img_align_celeba.zip" in steps[0] and "https://" in steps[0] and "MyDrive/srgan" in steps[1]
    told = capsys.readouterr().out
    assert "Too many users" in told and "HfHubHTTPError" in told
    assert all(line.startswith("CelebA: ") for line in told.splitlines())  # whatever a client says is told in one line


def test_a_missing_client_is_passed_over(celeba, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # import then raises ImportError
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    with pytest.raises(ConnectionError):
        srgan.open_source("celeba")
    assert celeba.asked == ["Google Drive"] and capsys.readouterr().out.count("no client for") == 2


def test_hugging_faces_zip_is_checked_and_used(celeba):
    def fetch(repository, filename, *, repo_type, local_dir):
        assert (repository, repo_type) == (srgan._CELEBA["hugging_face"], "dataset")
        (local_dir / filename).write_bytes(celeba.data)

    celeba.hub.hf_hub_download = fetch
    assert len(srgan.open_source("celeba").names) == 6
    celeba.hub.hf_hub_download = None
    assert len(srgan.open_source("celeba").names) == 6 and celeba.asked == []  # found in the cache


def test_kaggles_folder_is_used_after_a_wrong_zip_from_hugging_face(celeba, tmp_path):
    def download(name):
        folder_of(tmp_path / "kaggle" / "img_align_celeba" / "img_align_celeba", CELEBA_ENDS)
        return str(tmp_path / "kaggle")

    celeba.hub.hf_hub_download = lambda *_, local_dir, **__: (local_dir / "img_align_celeba.zip").write_bytes(b"404")
    celeba.kaggle.dataset_download = download
    assert srgan.open_source("celeba").names == CELEBA_ENDS and celeba.asked == []


@pytest.mark.parametrize("already", [None, b"cut off"], ids=["empty cache", "a damaged zip in the cache"])
def test_google_drives_zip_comes_last(celeba, already):
    def download(*, id, output, quiet, resume=False):
        assert id == srgan._CELEBA["drive"]
        target = celeba.cache / "img_align_celeba.zip"
        if not (resume and target.exists()):  # as gdown has it: what is there is taken for whole
            target.write_bytes(celeba.data)
        return output

    celeba.cache.mkdir(parents=True)
    if already:
        (celeba.cache / "img_align_celeba.zip").write_bytes(already)
    celeba.gdown.side_effect = download
    assert len(srgan.open_source("celeba").names) == 6
    assert celeba.asked == ["Hugging Face", "Kaggle"]


# --- Batches: functions of (seed, update)


SMALL = {"hr_size": 32, "patch_size": 16, "batch_size": 4}


def test_each_epoch_visits_each_face_once():
    config, count = srgan.Config(batch_size=4, seed=5), 10
    order = np.concatenate([srgan.batch_indices(config, update, count) for update in range(10)]).reshape(4, count)
    assert np.array_equal(np.sort(order), np.tile(np.arange(count), (4, 1)))
    assert len({tuple(epoch) for epoch in order.tolist()}) == 4
    other = np.concatenate([srgan.batch_indices(srgan.Config(batch_size=4, seed=6), update, count) for update in range(10)])
    assert not np.array_equal(order.ravel(), other)
    assert np.array_equal(srgan.batch_indices(config, 7, count), order.ravel()[28:32])  # out of order


def test_a_batch_is_a_function_of_seed_and_update(store):
    config = srgan.Config(**SMALL)
    state = torch.get_rng_state()
    first = [srgan.batch(store, config, update, CPU) for update in range(3)]
    assert torch.equal(torch.get_rng_state(), state)  # torch's own generator is neither used nor moved
    torch.manual_seed(1)
    for update in (2, 0, 1):
        assert all(map(torch.equal, srgan.batch(store, config, update, CPU), first[update]))
    assert not torch.equal(first[0][1], first[1][1])
    assert not torch.equal(srgan.batch(store, srgan.Config(**SMALL, seed=1), 0, CPU)[1], first[0][1])


def test_flips_and_patches_too_are_functions_of_seed_and_update(store, monkeypatch):
    monkeypatch.setattr(srgan, "batch_indices", lambda *_: np.arange(4))  # the same faces each time
    cuts = [srgan.batch(store, srgan.Config(**SMALL, seed=seed), update, CPU)[1] for seed in (0, 1) for update in (0, 1)]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(cuts, 2))


@pytest.mark.parametrize("scale, crop, flip", [(2, 176, True), (4, 178, True), (8, 145, True), (4, 144, False)])
def test_patches_and_flips_are_in_step(store, scale, crop, flip):
    """Every (lr, hr) patch is one place of one whole training face, mirrored or not, cut from both."""
    config, members = srgan.Config(scale=scale, crop=crop, flip=flip, **SMALL), store.indices("train")
    small, places, mirrored = 16 // scale, set(), []
    for update in range(5):
        lr, hr = srgan.batch(store, config, update, CPU)
        assert lr.shape == (4, 3, small, small) and hr.shape == (4, 3, 16, 16)
        faces = store.faces(members[srgan.batch_indices(config, update, len(members))])
        wholes = [srgan.make_pair(faces, config), srgan.make_pair(faces.flip(-1), config)]
        for i in range(4):
            found = [(y, x, bool(side)) for side, (whole_lr, whole_hr) in enumerate(wholes)
                     for y in range(32 // scale - small + 1) for x in range(32 // scale - small + 1)
                     if torch.allclose(whole_hr[i, :, y * scale:y * scale + 16, x * scale:x * scale + 16], hr[i], atol=1e-3)
                     and torch.allclose(whole_lr[i, :, y:y + small, x:x + small], lr[i], atol=1e-3)]
            assert len(found) == 1
            places.add(found[0][:2])
            mirrored.append(found[0][2])
    assert len(places) > 3
    assert any(mirrored) == flip and not all(mirrored)


@pytest.mark.parametrize("crop, hr_size, scale", [(176, 176, 4), (178, 128, 8), (144, 256, 4), (178, 176, 2)])
def test_a_pair_is_the_centre_crop_and_its_reduction_as_pillow_makes_them(crop, hr_size, scale):
    squares = [picture(0), picture(3)]  # away from black and white, where Pillow clamps between its two passes
    faces = torch.stack([torch.from_numpy(np.array(square)).permute(2, 0, 1) for square in squares])
    lr, hr = srgan.make_pair(faces, srgan.Config(crop=crop, hr_size=hr_size, scale=scale))
    assert lr.shape == (2, 3, hr_size // scale, hr_size // scale) and hr.shape == (2, 3, hr_size, hr_size)
    edge = (178 - crop) // 2
    for i, square in enumerate(squares):
        whole = square.crop((edge, edge, edge + crop, edge + crop)).resize((hr_size, hr_size), Image.BICUBIC)
        ours = hr[i].permute(1, 2, 0).numpy() * 255
        assert np.abs(ours - np.asarray(whole)).max() < 1.01 and np.abs(ours - ours.round()).max() < 1e-3
        reduced = Image.fromarray(ours.round().astype(np.uint8)).resize((hr_size // scale,) * 2, Image.BICUBIC)
        assert np.abs(lr[i].permute(1, 2, 0).numpy() * 255 - np.asarray(reduced)).max() < 1.01


# --- Uploads


SEVEN = {"a.png": {"metadata": {"name": "a.png"}, "content": b"one"}, "../b.jpg": {"metadata": {}, "content": b"two"}}
EIGHT = tuple({"name": name, "type": "image/png", "size": 3, "content": memoryview(data), "last_modified": datetime(2026, 1, 1)}
              for name, data in (("a.png", b"one"), ("../b.jpg", b"two")))


@pytest.mark.parametrize("value", [SEVEN, EIGHT], ids=["ipywidgets 7", "ipywidgets 8"])
def test_both_formats_of_a_file_upload_are_read(value):
    files = srgan.uploaded_files(SimpleNamespace(value=value))
    assert files == [("a.png", b"one"), ("../b.jpg", b"two")]
    assert all(type(data) is bytes for _, data in files)
    assert srgan.uploaded_files(SimpleNamespace(value=type(value)())) == []


def test_the_upload_widget_saves_into_the_folder_and_nowhere_else(tmp_path):
    widget = srgan.upload_images(tmp_path / "in" / "photos")
    widget.set_trait("value", SEVEN if isinstance(widget.value, dict) else EIGHT)  # what the installed version calls for
    files = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"in/photos/a.png": b"one", "in/photos/b.jpg": b"two"}


@pytest.mark.parametrize("folder", ["photos", "."])
def test_colabs_upload_leaves_one_copy_in_the_folder(tmp_path, monkeypatch, folder):
    def upload():  # writes into the current folder, and returns the same
        (tmp_path / "a.png").write_bytes(b"one")
        return {"a.png": b"one"}

    colab = ModuleType("google.colab")
    colab.files = SimpleNamespace(upload=upload)
    monkeypatch.setitem(sys.modules, "google", ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setattr(srgan, "in_colab", lambda: True)
    monkeypatch.chdir(tmp_path)
    assert srgan.upload_images(folder) is None
    files = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {(tmp_path / folder / "a.png").relative_to(tmp_path).as_posix(): b"one"}


def test_names_that_are_not_utf8_are_prepared_too(tmp_path):
    """As old zips leave them on Linux; they must come through the store, its split and every report."""
    source = folder_of(tmp_path / "in", ["a.png"])
    os.rename(source / "a.png", os.fsencode(source) + b"/caf\xe9.png")
    store = srgan.prepare(source, tmp_path / "store")
    assert store.names == ["caf\ufffd.png"] and np.array_equal(stored(store, 0), np.asarray(picture(0)))


def test_faces_kept_on_a_device_are_the_same(store):
    """As on a GPU that holds them all: the training faces from its memory, others from the disk."""
    kept = srgan.FaceStore(store.folder)
    kept.keep_on(CPU)
    kept._pixels = None  # nothing to read any more
    for update in (0, 3):
        expected = srgan.batch(store, srgan.Config(**SMALL), update, CPU)
        assert all(map(torch.equal, srgan.batch(kept, srgan.Config(**SMALL), update, CPU), expected))
    assert kept.faces(kept.indices("train")[:2], CPU).stride() == store.faces([0, 1]).stride()
    with pytest.raises(TypeError):
        kept.faces(kept.indices("test"), CPU)
    kept.keep_on(None)
    with pytest.raises(TypeError):
        kept.faces(kept.indices("train"), CPU)
