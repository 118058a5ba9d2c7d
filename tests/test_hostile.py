"""Foreign bytes: what is hostile is refused in one line; nothing in it runs, lands elsewhere, hangs or fills the memory.

FUZZ_EXAMPLES=20000 python -m pytest tests/test_hostile.py -k fuzz -s    prints how many inputs each reader was given
"""

import copy
import hashlib
import io
import json
import math
import os
import shutil
import stat
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zipfile
import zlib
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save as safetensors

import srgan_utils as srgan

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 60))


def is_one_line(text: str) -> bool:
    """Whether a terminal shows it as one line, whatever a stranger has put into it."""
    return bool(text) and text.isprintable()


def face(number: int = 0, kind: str = "PNG", side: int = 96, **options) -> bytes:
    """A file with a picture that no other number has."""
    y, x = np.mgrid[:side, :side]
    waves = [120 + 100 * np.sin((x * (number % 5 + 1) + y * channel) / 25 + number) for channel in (1, 2, 3)]
    file = io.BytesIO()
    Image.fromarray(np.stack(waves, -1).astype(np.uint8)).save(file, kind, **options)
    return file.getvalue()


def contents(*folders) -> dict:
    """Every file and folder below `folders`, files with their bytes."""
    return {path: path.read_bytes() if path.is_file() else None for folder in folders for path in Path(folder).rglob("*")}


def packed(*entries, method=zipfile.ZIP_STORED) -> bytes:
    """A zip with one good face and `entries`: pairs of a name, or a ZipInfo, and bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in (("good.png", face()), *entries):
            archive.writestr(name, data)
    return file.getvalue()


def nameless() -> bytes:
    """Two entries that are called nothing at all, and `.`"""
    data = bytearray(packed(("#%#", b"x"), (".", b"x")))
    for at, lengths in ((data.index(b"#%#"), -4), (data.rindex(b"#%#"), -18)):
        struct.pack_into("<HH", data, at + lengths, 0, 3)  # what was the name is now an extra field without meaning
    return bytes(data)


def marked(kind: int) -> bytes:
    """A zip whose last entry is a link, a device, ..."""
    info = zipfile.ZipInfo("odd.png")
    info.external_attr = (kind | 0o777) << 16
    return packed((info, b"/etc/passwd"))


def in_directory(data: bytes, offset: int, form: str, *values) -> bytes:
    """`data` with numbers overwritten in the directory's record of the last entry."""
    data = bytearray(data)
    struct.pack_into(form, data, data.rindex(b"PK\1\2") + offset, *values)
    return bytes(data)


def overlapping() -> bytes:
    """300 entries that share one megabyte of zeros, as in the densest bombs."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", bytes(1 << 20))
        for number in range(1, 300):
            info = copy.copy(archive.filelist[0])
            info.filename = f"{number}.png"
            archive.filelist.append(info)
    return file.getvalue()


# --- Zips that are refused as a whole


def one(*details, **options) -> bytes:
    """A zip with one more face, and a detail of its directory overwritten."""
    data = packed(("a.png", face(1)), **options)
    return in_directory(data, *details) if details else data


HOSTILE = {
    "up": (lambda: packed(("../out.png", face(1))), "leads out"),
    "down and up": (lambda: packed(("a/../../out.png", face(1))), "leads out"),
    "absolute": (lambda: packed(("/out.png", face(1))), "leads out"),
    "drive": (lambda: packed(("C:/out.png", face(1))), "leads out"),
    "drive without a slash": (lambda: packed(("C:out.png", face(1))), "leads out"),
    "backslashes": (lambda: packed(("..\\out.png", face(1))), "leads out"),
    "network share": (lambda: packed(("\\\\host\\out.png", face(1))), "leads out"),
    "a folder outside": (lambda: packed(("../out/", b"")), "leads out"),
    "hidden": (lambda: packed((".hidden/../../out", b"")), "leads out"),
    "link": (lambda: marked(stat.S_IFLNK), "link or a device"),
    "character device": (lambda: marked(stat.S_IFCHR), "link or a device"),
    "block device": (lambda: marked(stat.S_IFBLK), "link or a device"),
    "pipe": (lambda: marked(stat.S_IFIFO), "link or a device"),
    "twice": (lambda: packed(("gooo.png", face(1))).replace(b"gooo.png", b"good.png"), "twice"),
    "twice for Windows": (lambda: packed(("a/b.png", face(1)), ("a\\b.png", face(2))), "twice"),
    "encrypted": (lambda: one(8, "<H", 1), "encrypted"),
    "bzip2": (lambda: one(method=zipfile.ZIP_BZIP2), "unusual"),
    "lzma": (lambda: one(method=zipfile.ZIP_LZMA), "unusual"),
    "unknown method": (lambda: one(10, "<H", 99), "unusual"),
    "bomb": (lambda: packed(("a.png", bytes(110_000_000)), method=zipfile.ZIP_DEFLATED), "bomb"),
    "4 GB promised": (lambda: one(24, "<I", 0xFFFFFFF0), "bomb"),
    "overlapping bomb": (overlapping, "bomb"),
    "a newer kind of zip": (lambda: one(6, "<H", 255), "not a zip"),
    "cut at the end": (lambda: one()[:-30], "cut off"),
    "cut in the middle": (lambda: one()[:900], "cut off"),
    "one byte": (lambda: one()[:1], "cut off"),
    "nothing": (lambda: b"", "cut off"),
}


@pytest.mark.parametrize("make, message", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_zip_is_refused_in_one_line(tmp_path, capsys, make, message):
    path, store = tmp_path / "deep" / "hostile.zip", tmp_path / "deep" / "store"
    path.parent.mkdir()
    path.write_bytes(make())
    (tmp_path / "out.png").write_bytes(b"mine")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        srgan.prepare(path, store)
    assert is_one_line(str(caught.value)) and str(path) in str(caught.value)
    assert srgan.main(["prepare", str(path), "--store", str(store)]) == 2
    assert is_one_line(capsys.readouterr().err.removesuffix("\n"))
    assert contents(tmp_path) == before


def test_a_refused_zip_touches_no_store_that_is_there(tmp_path):
    (tmp_path / "good.zip").write_bytes(packed())
    srgan.prepare(tmp_path / "good.zip", tmp_path / "store")
    (tmp_path / "bad.zip").write_bytes(packed(("../out.png", face(1))))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="already holds"):
        srgan.prepare(tmp_path / "bad.zip", tmp_path / "store")
    assert contents(tmp_path) == before


# --- Zips of which only entries are bad


def scans(count: int = 5_000) -> bytes:
    """A progressive JPEG whose scans come again and again."""
    data = face(3, "JPEG", progressive=True)
    at = data.index(b"\xff\xda")
    return data[:at] + data[at:-2] * count + data[-2:]


def png_of(width: int, height: int, kind: int = 2, data: bytes = bytes(99)) -> bytes:
    """A PNG whose header promises width x height, whatever its data are."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
                                          for kind, data in chunks)


BAD_ENTRIES = {
    "bomb.png": (lambda: png_of(20_000, 20_000), "absurdly large"),
    "cut.jpg": (lambda: face(1, "JPEG")[:1000], "truncated"),
    "empty.png": (lambda: b"", "not an image"),
    "lies-of-size.png": (lambda: png_of(96, 96), "truncated"),
    "nested.zip": (packed, "zip within"),
    "nested.png": (packed, "zip within"),
    "postscript.eps": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", "not an image"),
    "scans.jpg": (scans, "more scans"),
    "exif.jpg": (lambda: face(kind="JPEG")[:2] + b"\xff\xe1\x00\x08Exif\0\0" * 501 + face(kind="JPEG")[2:], "segments"),
    "text.png": (lambda: b"a text", "not an image"),
}


def test_bad_entries_are_left_out_and_named(tmp_path):
    path = tmp_path / "in.zip"
    path.write_bytes(packed(("a-png.jpg", face(1)), *((name, make()) for name, (make, _) in BAD_ENTRIES.items())))
    store = srgan.prepare(path, tmp_path / "store")
    assert store.names == ["a-png.jpg", "good.png"]
    reasons = dict(store.left_out)
    assert sorted(reasons) == sorted(BAD_ENTRIES) and all(is_one_line(why) for why in reasons.values())
    for name, (_, why) in BAD_ENTRIES.items():
        assert why in reasons[name], name


def zip_tampered_with(how: str) -> bytes:
    """A zip whose entry a.png is not what the directory says."""
    data = packed(("a.png", face(1)))
    return {"contents": lambda: data[:-300] + bytes([data[-300] ^ 1]) + data[-299:],
            "checksum": lambda: in_directory(data, 16, "<I", 1),
            "larger": lambda: in_directory(data, 24, "<I", 90_000_000),
            "smaller": lambda: in_directory(data, 24, "<I", 100),
            "elsewhere": lambda: in_directory(data, 42, "<I", len(data) - 60),
            "another name": lambda: data.replace(b"a.png", b"b.png", 1),
            "method": lambda: in_directory(data, 10, "<H", zipfile.ZIP_DEFLATED)}[how]()


@pytest.mark.parametrize("how", ["contents", "checksum", "larger", "smaller", "elsewhere", "another name", "method"])
def test_an_entry_that_is_not_what_the_directory_says_is_left_out(tmp_path, how):
    (tmp_path / "in.zip").write_bytes(zip_tampered_with(how))
    store = srgan.prepare(tmp_path / "in.zip", tmp_path / "store")
    assert store.names == ["good.png"] and len(store.left_out) == 1 and is_one_line(store.left_out[0][1])


@pytest.mark.parametrize("promised", [100, 90_000_000])
def test_a_bomb_that_lies_is_not_inflated_beyond_what_it_says(tmp_path, promised):
    """The entry holds 200 MB of zeros; the directory may say less."""
    squeezed = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = b"".join(squeezed.compress(bytes(10_000_000)) for _ in range(20)) + squeezed.flush()
    bomb = in_directory(packed(("a.png", data)), 10, "<H8xII", zipfile.ZIP_DEFLATED, len(data), promised)
    (tmp_path / "in.zip").write_bytes(bomb)
    tracemalloc.start()
    try:
        assert srgan.prepare(tmp_path / "in.zip", tmp_path / "store").names == ["good.png"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * promised + 20_000_000


def test_entries_without_a_name_are_passed_over(tmp_path):
    (tmp_path / "in.zip").write_bytes(nameless())
    assert srgan.prepare(tmp_path / "in.zip", tmp_path / "store").names == ["good.png"]


def test_a_great_many_entries_are_no_hang(tmp_path):
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for number in range(10_000):
            archive.writestr(f"{number}.png", b"junk")
    with pytest.raises(ValueError, match=r"no usable image \(10000 left out") as caught:
        srgan.prepare(tmp_path / "in.zip", tmp_path / "store")
    assert is_one_line(str(caught.value)) and len(str(caught.value)) < 1000


def test_more_entries_than_any_data_set_has_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(srgan, "_ZIP_ENTRIES", 3)
    (tmp_path / "in.zip").write_bytes(packed(*((f"{number}.png", b"") for number in range(3))))
    with pytest.raises(ValueError, match="4 entries"):
        srgan.open_source(tmp_path / "in.zip")


def test_names_cannot_move_the_cursor(tmp_path, capsys):
    """A terminal obeys what it is shown; the names of entries are a stranger's."""
    entries = [("a\x1b[2J\x07.png", b"junk"), ("b\nc\r.png", b"junk"), ("d\x9b1m\u202egnp.png", b"junk")]
    (tmp_path / "in.zip").write_bytes(packed(*entries))
    assert srgan.main(["prepare", str(tmp_path / "in.zip"), "--store", str(tmp_path / "store")]) == 0
    told = capsys.readouterr().out
    assert "3 left out" in told and all(is_one_line(line) for line in told.removesuffix("\n").split("\n"))
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        for name, data in entries:
            archive.writestr(name, data)
    with pytest.raises(ValueError, match="no usable image") as caught:
        srgan.prepare(tmp_path / "bad.zip", tmp_path / "other")
    assert is_one_line(str(caught.value))


def test_a_command_shows_no_warnings_of_the_decoders(tmp_path):
    """In a process of its own, since pytest keeps warnings to itself."""
    corrupt_exif = face(1, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 40)
    (tmp_path / "in.zip").write_bytes(packed(("exif.jpg", corrupt_exif), ("large.png", png_of(12_000, 10_000))))
    command = [sys.executable, srgan.__file__, "prepare", tmp_path / "in.zip", "--store", tmp_path / "store"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and "absurdly large" in ended.stdout
    assert "Warning" not in ended.stderr


# --- Records: store.json, config.json, manifest.json


def resealed_text(text: str) -> bytes:
    """JSON that is given as text, with the checksum that belongs to it."""
    body = text.rstrip()[:-1].rstrip().encode("utf-8", "surrogatepass")
    return body + f',\n "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def resealed(record: dict, refit: bool = False) -> bytes:
    """A record as a hostile author would seal it: `refit` also makes a store's fingerprint fit."""
    if refit and {"names", "blocks", "split"} <= record.keys():
        told = json.dumps([record["names"], record["blocks"], record["split"]]).encode()
        record = record | {"fingerprint": hashlib.sha256(told).hexdigest()}
    return resealed_text(json.dumps(record))


def depths() -> range:
    """How deep JSON may be nested about where Python gives up: its reader, then what is done with the value."""
    return range(sys.getrecursionlimit() - 180, sys.getrecursionlimit())


@pytest.fixture(scope="module")
def small_store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    entries = [(f"{number}.png", face(number)) for number in range(5)]
    (folder / "in.zip").write_bytes(packed(*entries, ("note.txt", b"left out")))
    srgan.prepare(folder / "in.zip", folder / "store")
    return folder / "store"


@pytest.fixture
def spare_store(small_store, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(small_store, tmp_path / "spare"))


def use_store(folder) -> str:
    """Open a store and use all of it; what a good one must have."""
    store = srgan.FaceStore(folder)
    store.verify()
    assert store.describe() and len(store) == len(store.names) == len(store.faces(range(len(store))))
    assert all(type(name) is str for name in [store.source, store.title, *store.names, *store.enlarged])
    assert all(type(name) is type(why) is str for name, why in store.left_out)
    store.indices("all")
    return "accepted"


@pytest.mark.parametrize("change", [
    {"blocks": [[6.0, ""]]}, {"blocks": [[-1, ""], [7, ""]]}, {"blocks": [[[2, 4], ""]]}, {"blocks": {"ab": 1}},
    {"blocks": [["6", ""]]}, {"blocks": []}, {"blocks": [[10**30, ""]]},
    {"names": "abcdef"}, {"names": [1, 2, 3, 4, 5, 6]}, {"names": {name: 1 for name in "abcdef"}},
    {"split": [[0]] * 6}, {"split": [0.5] * 6}, {"split": [True] * 6}, {"split": [math.nan] * 6}, {"split": [-1] * 6},
    {"split": ["0"] * 6}, {"split": 0}, {"left_out": 5}, {"left_out": [["a"]]}, {"left_out": [[1, 2]]}, {"enlarged": None},
    {"enlarged": [3]}, {"title": 5}, {"source": None}, {"limit": "many"},
], ids=str)
def test_a_store_of_odd_values_is_refused_though_its_checksum_fits(spare_store, change):
    record = json.loads((spare_store / "store.json").read_text())
    del record["sha256"]
    (spare_store / "store.json").write_bytes(resealed(record | change, refit=True))
    with pytest.raises(ValueError) as caught:
        use_store(spare_store)
    assert is_one_line(str(caught.value))


@pytest.mark.parametrize("field", ["names", "blocks", "split", "title", "left_out", "format"])
def test_a_store_nested_as_deep_as_json_goes_is_refused(spare_store, field):
    record = json.loads((spare_store / "store.json").read_text())
    del record["sha256"]
    whole = json.dumps(record | {field: "@"})
    for depth in depths():
        (spare_store / "store.json").write_bytes(resealed_text(whole.replace('"@"', "[" * depth + "]" * depth)))
        with pytest.raises(ValueError):
            use_store(spare_store)


# --- Weights


@pytest.fixture(scope="module")
def network() -> tuple[dict, dict]:
    """The tensors and the header of a small generator with BatchNorm."""
    config = srgan.Config.preset("report", hr_size=32, channels=4, residual_blocks=1, scale=2)
    return dict(srgan.Generator(config).state_dict()), {"format": 1, "config": asdict(config), "update": 3}


def weights(tensors: dict, header: str) -> bytes:
    """A weights file as a hostile author would make it: its digest fits."""
    tensors = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    return safetensors(tensors, metadata={"srgan": header, "sha256": srgan._digest(tensors, header)})


def use_weights(path) -> str:
    generator, config, _ = srgan.load_generator(path)
    assert isinstance(config, srgan.Config)
    assert generator(torch.zeros(1, 3, 4, 4)).shape == (1, 3, 4 * config.scale, 4 * config.scale)
    return "accepted"


@pytest.mark.parametrize("change", [
    {"preset_name": []}, {"preset_name": {}}, {"preset_name": "a\nb"}, {"channels": 8}, {"channels": -4}, {"channels": 10**400},
    {"channels": 10**9}, {"residual_blocks": 2}, {"residual_blocks": [1]}, {"content_weight": 10**400}, {"ema": math.nan},
    {"learning_rate": math.inf}, {"scale": "2\n4"}, {"scale": {}}, {"output": None}, {"output": "a\x1b[2Jb"},
    {"no such field": 1}, {"no\nsuch\x1b[2J field": 1}, {"kernel_size": True}, {"batch_norm": 0},
], ids=str)
def test_weights_with_a_hostile_config_are_refused(tmp_path, network, change):
    tensors, header = network
    path = tmp_path / "g.safetensors"
    path.write_bytes(weights(tensors, json.dumps(header | {"config": header["config"] | change})))
    with pytest.raises(ValueError) as caught:
        srgan.load_generator(path)
    assert is_one_line(str(caught.value))


@pytest.mark.parametrize("field", ["preset_name", "scale", "output", "content_weight", "seed"])
def test_weights_with_a_config_nested_as_deep_as_json_goes_are_refused(tmp_path, network, field):
    tensors, header = network
    whole = json.dumps(header | {"config": header["config"] | {field: "@"}})
    for depth in depths():
        (tmp_path / "g.safetensors").write_bytes(weights(tensors, whole.replace('"@"', "[" * depth + "]" * depth)))
        with pytest.raises(ValueError):
            srgan.load_generator(tmp_path / "g.safetensors")


KINDS = (torch.complex64, torch.bool, torch.uint8, torch.int64, torch.uint64)


@pytest.mark.parametrize("change", [
    *(lambda value, kind=kind: value.to(kind) for kind in KINDS), lambda value: value.flatten(), lambda value: value[:0],
    lambda value: value[None], lambda value: torch.zeros(()), lambda value: torch.zeros(0, 2**40),
], ids=[*map(str, KINDS), "flat", "empty", "one more axis", "a number", "nothing, but large"])
def test_weights_of_another_kind_or_shape_are_refused(tmp_path, network, change):
    tensors, header = network
    for name in ("head.0.weight", "blocks.0.0.weight", *list(tensors)[:1]):
        if name in tensors:
            (tmp_path / "g.safetensors").write_bytes(weights(tensors | {name: change(tensors[name])}, json.dumps(header)))
            with pytest.raises(ValueError, match="does not hold the network") as caught:
                srgan.load_generator(tmp_path / "g.safetensors")
            assert is_one_line(str(caught.value))


@pytest.mark.parametrize("change", [
    lambda tensors: {}, lambda tensors: dict(list(tensors.items())[1:]), lambda tensors: tensors | {"more": torch.zeros(2)},
    lambda tensors: tensors | {"line\nbreak\x1b[2J": torch.zeros(2)},
], ids=["none", "one fewer", "one more", "an odd name"])
def test_weights_missing_or_too_many_are_refused(tmp_path, network, change):
    tensors, header = network
    (tmp_path / "g.safetensors").write_bytes(weights(change(tensors), json.dumps(header)))
    with pytest.raises(ValueError, match="does not hold the network") as caught:
        srgan.load_generator(tmp_path / "g.safetensors")
    assert is_one_line(str(caught.value))


# --- Checkpoints


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Huge:
    """Asks for three gigabytes when it is unpickled, in a few bytes."""

    def __reduce__(self):
        return bytearray, (3_000_000_000,)


def saved(state) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def sealed(archive: bytes) -> bytes:
    """A zip with the comment that `save_checkpoint` ends its files in."""
    body = archive[:-2] + (71).to_bytes(2, "little") + b"sha256:"
    return body + hashlib.sha256(body).hexdigest().encode()


def rezipped(archive: bytes, method: int = zipfile.ZIP_STORED, change=lambda name, data: data) -> bytes:
    """The same records in a zip of Python's."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)), method)
    return file.getvalue()


def two_faced(archive: bytes) -> bytes:
    """A zip of squeezed records which Python takes for one of plain records.

    It has two directories: torch goes by the one that the end names, Python by the one that lies before the end.
    """
    squeezed, plain = rezipped(archive, zipfile.ZIP_DEFLATED), rezipped(archive, change=lambda name, data: b"x")
    size, start = struct.unpack("<II", plain[-10:-2])
    return squeezed[:-22] + plain[start:start + size] + squeezed[-22:]


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    """A run of networks as small as can be, with a backup; its discriminator is small too."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(srgan, "_POOLED_LAYERS", ((4, 3, 1), (4, 4, 2)))
        patch.setattr(os, "fsync", lambda number: None)  # thousands of checkpoints are written here
        for _ in srgan.train(store, folder / "run", "sharp", TINY, backup=folder / "backup"):
            pass
        yield folder / "run"


@pytest.fixture(scope="module")
def halfway(run) -> dict:
    """The checkpoint of update 4 of 6: both optimisers have begun."""
    return srgan.load_checkpoint(run / "ckpt" / "update-00000004.pt")


class Began(Exception):
    """A run was taken up."""


@pytest.fixture
def continued(store, run, tmp_path, monkeypatch):
    """Continue a copy of the run from other bytes of its checkpoint, up to where it would compute."""
    def begin(*_):
        raise Began

    monkeypatch.setattr(srgan, "_one_update", begin)
    folder, right = tmp_path / "run", (run / "config.json").read_bytes()
    (folder / "ckpt").mkdir(parents=True)

    def go(checkpoint: bytes | None = None, config: bytes | None = right) -> str:
        (folder / "config.json").unlink(missing_ok=True)
        for path in (folder / "ckpt").iterdir():
            path.unlink()
        if config is not None:
            (folder / "config.json").write_bytes(config)
        path = folder / "ckpt" / "update-00000004.pt"
        path.write_bytes((run / "ckpt" / path.name).read_bytes() if checkpoint is None else checkpoint)
        try:
            events = srgan.train(store, folder)
            next(events)
            events.close()
        except Began:
            pass
        return "accepted"

    return go


def test_the_run_that_is_spoilt_below_is_good(continued, halfway):
    """Else all would be refused for another reason."""
    assert continued() == "accepted"
    assert continued(sealed(saved(halfway))) == "accepted"
    assert continued(sealed(rezipped(saved(halfway))), None) == "accepted"


@pytest.mark.parametrize("place", [lambda evil: evil, lambda evil: {"update": 3, "x": evil}, lambda evil: {evil: 1, "update": 3}])
def test_code_in_a_sealed_checkpoint_is_not_run(tmp_path, place):
    path = tmp_path / "update-00000003.pt"
    path.write_bytes(sealed(saved(place(Evil(tmp_path / "made")))))
    with pytest.raises(ValueError, match="not opened") as caught:
        srgan.load_checkpoint(path)
    assert is_one_line(str(caught.value)) and contents(tmp_path).keys() == {path}


def test_code_in_weights_for_vgg_is_not_run(tmp_path):
    torch.save({"w": Evil(tmp_path / "made")}, tmp_path / "vgg.pt")
    with pytest.raises(ValueError, match="not a file of VGG19 weights") as caught:
        srgan._vgg19_state(str(tmp_path / "vgg.pt"))
    assert is_one_line(str(caught.value)) and not (tmp_path / "made").exists()


def test_code_in_a_backup_is_not_run_and_an_older_state_is_found(tmp_path, run):
    backup = Path(shutil.copytree(run.parent / "backup", tmp_path / "backup"))
    newest = json.loads((backup / "manifest.json").read_text())["slot"]
    (backup / newest).write_bytes(sealed(saved({"update": 9, "generator": Evil(tmp_path / "made")})))
    assert srgan.newest_checkpoint(tmp_path / "none", backup)["update"] < 6
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("make", [
    lambda state: rezipped(saved(state), zipfile.ZIP_DEFLATED), lambda state: two_faced(saved(state)),
    lambda state: saved(state | {"x": Huge()}), lambda state: saved(state | {"x": torch.zeros(2).to_sparse()}),
    lambda state: saved(state | {"update": True}), lambda state: saved(state | {"update": -1}),
    lambda state: saved(state | {"update": 10**400}), lambda state: saved(state | {"update": 10**18}),
    lambda state: saved(state | {"format": 99}), lambda state: saved(state | {"format": None}),
    lambda state: saved([state]), lambda state: saved(torch.zeros(3)),
    lambda state: rezipped(saved(state), change=lambda *_: b""), lambda state: packed(),
], ids=["squeezed", "two directories", "three gigabytes", "sparse", "odd update", "negative", "huge update", "large update",
        "newer", "no format", "list", "tensor", "empty records", "another zip"])
def test_a_hostile_checkpoint_is_refused_though_its_checksum_fits(tmp_path, make):
    path = tmp_path / "update-00000003.pt"
    path.write_bytes(sealed(make({"format": 1, "update": 3, "x": torch.zeros(5_000)})))
    with pytest.raises(ValueError, match="update-00000003.pt") as caught:
        srgan.load_checkpoint(path)
    assert is_one_line(str(caught.value))


def doubled(times: int):
    """A list of 2 ** times numbers, in a few bytes."""
    value = [1]
    for _ in range(times):
        value = [value, value]
    return value


def moments(change):
    """A change of the first weight's moments in the generator's optimiser."""
    def changed(state):
        optimizer = state["g_optimizer"]
        return {"g_optimizer": optimizer | {"state": optimizer["state"] | {0: change(optimizer["state"][0])}}}

    return changed


def every(part, change):
    return lambda state: {part: {name: change(value) for name, value in state[part].items()}}


def config_with(**changes):
    return lambda state: {"config": state["config"] | changes}


UNFIT = {
    "generator is None": lambda state: {"generator": None},
    "generator is empty": lambda state: {"generator": {}},
    "generator is a list": lambda state: {"generator": [1]},
    "generator is a tensor": lambda state: {"generator": torch.ones(3)},
    "other shapes": every("generator", lambda value: value.flatten()),
    "no tensors": every("generator", lambda value: None),
    "complex": every("generator", lambda value: value.to(torch.complex64)),
    "whole numbers": every("generator", lambda value: value.long()),
    "no data": every("generator", lambda value: value.to("meta")),
    "no discriminator": lambda state: {"discriminator": None},
    "no average": lambda state: {"ema": None},
    "no optimiser": lambda state: {"d_optimizer": None},
    "optimiser without state": lambda state: {"g_optimizer": {"param_groups": []}},
    "state of another kind": lambda state: {"g_optimizer": state["g_optimizer"] | {"state": [1]}},
    "moments of another shape": moments(lambda each: each | {"exp_avg": torch.zeros(2)}),
    "moments that are sparse": moments(lambda each: each | {"exp_avg": each["exp_avg"].to_sparse()}),
    "moments that are words": moments(lambda each: each | {"exp_avg": "a"}),
    "a step that is a word": moments(lambda each: each | {"step": "a"}),
    "no step": moments(lambda each: {name: value for name, value in each.items() if name != "step"}),
    "billions of numbers": moments(lambda each: each | {"more": doubled(18)}),
    "seconds without end": lambda state: {"seconds": 10**400},
    "seconds in words": lambda state: {"seconds": "long"},
    "history of another kind": lambda state: {"history": 3},
    "history that is no text": lambda state: {"history": "\ud800"},
    "other faces": lambda state: {"store": "a\nb"},
    "faces of another kind": lambda state: {"store": torch.ones(3)},
    "another seed": config_with(seed=7),
    "a seed in two lines": config_with(seed="a\nb\x1b[2J"),
    "a seed that is a tensor": config_with(seed=torch.ones(3, 3)),
    "no config": lambda state: {"config": None},
}


@pytest.mark.parametrize("change", UNFIT.values(), ids=UNFIT)
def test_a_sealed_checkpoint_of_unfit_parts_stops_the_run_in_one_line(continued, halfway, change):
    with pytest.raises(ValueError) as caught:
        continued(sealed(saved(halfway | change(halfway))))
    assert is_one_line(str(caught.value))


@pytest.mark.parametrize("changes", [
    {"preset_name": []}, {"steps": None, "pretrain_steps": None}, {"decay_steps": None}, {"channels": 10**400},
    {"content_weight": 10**400}, {"decay": "a\nb"}, {"seed": torch.ones(3, 3)}, {7: 1}, {"a\nb": 1},
], ids=str)
def test_a_config_of_odd_values_stops_the_run_in_one_line(continued, halfway, changes):
    """Whether config.json is lost, and the checkpoint tells how the run was made, or tells the same."""
    config = halfway["config"] | changes
    checkpoint = sealed(saved(halfway | {"config": config}))
    plain = {str(name): str(value) if isinstance(value, torch.Tensor) else value for name, value in config.items()}
    for record in (None, resealed({"format": 1, "config": plain, "store": halfway["store"]})):
        with pytest.raises(ValueError) as caught:
            continued(checkpoint, record)
        assert is_one_line(str(caught.value))


@pytest.mark.parametrize("update", [10**400, -(10**400), math.nan, "nan", [], None, {}], ids=lambda update: str(update)[:9])
def test_an_odd_manifest_keeps_no_backup_from_being_found(tmp_path, run, update):
    backup = Path(shutil.copytree(run.parent / "backup", tmp_path / "backup"))
    manifest = {"format": 1, "slot": [], "update": update, "session": {}}
    (backup / "manifest.json").write_bytes(resealed(manifest))
    found = srgan.newest_checkpoint(run / "ckpt", backup)
    assert found["update"] == 6
    srgan.Backup(backup).close()


# --- Fuzzing


def fuzz(reader: str, values: st.SearchStrategy, check) -> None:
    """Give `check`, which says whether a reader accepted or refused it, many values; print how many."""
    tally, longest = Counter(), 0.0

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck),
              derandomize="FUZZ_EXAMPLES" not in os.environ)
    @given(values)
    def run(value):
        nonlocal longest
        begun = time.perf_counter()
        tally[check(value)] += 1
        longest = max(longest, time.perf_counter() - begun)
        assert longest < 10, "it hangs"

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's and torch's, about damage
        run()
    print(f"\n{reader}: {sum(tally.values())} inputs, {tally['refused']} refused, {tally['accepted']} accepted, "
          f"the longest took {longest:.2f} s")


def tried(use, *arguments) -> str:
    """`accepted`, or `refused` in one line; anything but ValueError and OSError escapes."""
    try:
        return use(*arguments)
    except (ValueError, OSError) as error:
        assert is_one_line(str(error)), repr(str(error))
        return "refused"


EXTREMES = (b"\0", b"\xff", b"\x80", bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\0\0\0", b"\xff" * 8,
            b"\x01\0\0\0", b"\xff\xff", b"\n", b'"', b"[" * 64)


@st.composite
def damaged(draw, samples) -> bytes:
    """One of `samples` with some bytes changed, put in, left out, doubled, cut off, or taken from another."""
    data = bytearray(draw(st.sampled_from(samples)))
    for _ in range(draw(st.integers(1, 4))):
        end = len(data)
        at = draw(st.one_of(st.integers(0, min(64, end)), st.integers(0, end), st.integers(max(0, end - 64), end)))
        length = draw(st.integers(1, 32))
        kind = draw(st.sampled_from(["flip", "flip", "overwrite", "extreme", "insert", "delete", "double", "cut", "splice"]))
        if kind == "flip" and at < end:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind in ("overwrite", "extreme"):
            new = draw(st.binary(min_size=1, max_size=8) if kind == "overwrite" else st.sampled_from(EXTREMES))
            data[at:at + len(new)] = new
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "delete":
            del data[at:at + length]
        elif kind == "double":
            data[at:at] = data[at:at + length]
        elif kind == "cut":
            del data[at:]
        elif kind == "splice":
            other = draw(st.sampled_from(samples))
            data[at:] = other[draw(st.integers(0, len(other))):]
    return bytes(data)


NESTED = json.loads("[" * 60 + "]" * 60)
ODD = (None, True, False, -1, 0, 1, 3, 33, 2**31, 2**63, 10**400, 0.5, 1e308, -math.inf, math.nan, "", "a\nb", "\x1b[2J",
       "\ud800", "../../x", [], {}, [[]], [1, [2]], {"a": {"b": []}}, NESTED)
ODD_TENSORS = (*ODD, torch.zeros(()), torch.ones(3), torch.zeros(0), torch.ones(2, 2, dtype=torch.int64),
               torch.zeros(3) + 1j, torch.zeros(2, device="meta"), torch.zeros(2).to_sparse(), torch.zeros(1).expand(10**9),
               b"bytes", (1, 2), 1j, {1, 2})


@st.composite
def altered(draw, value, odd=ODD):
    """A copy of nested dicts and lists with some leaves or branches replaced, left out, or put in."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        node = value
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = draw(st.sampled_from(keys)) if keys else "new"
            if not (keys and isinstance(node[key], (dict, list)) and draw(st.integers(0, 3))):
                break
            node = node[key]
        what = draw(st.sampled_from(["replace", "replace", "replace", "delete", "add"]))
        if what == "delete" and keys:
            del node[key]
        elif isinstance(node, list) and (what == "add" or not keys):
            node.append(copy.deepcopy(draw(st.sampled_from(odd))))
        else:
            name = draw(st.sampled_from(["new", "a\nb", ""])) if what == "add" else key
            node[name] = copy.deepcopy(draw(st.sampled_from(odd)))
    return value


IMAGES = {
    "JPEG": ({}, {"progressive": True}), "PNG": ({},), "WEBP": ({}, {"lossless": True}), "BMP": ({},), "GIF": ({},),
    "TIFF": ({}, {"compression": "tiff_lzw"}, {"compression": "tiff_deflate"}, {"compression": "jpeg"}), "PPM": ({},),
}


def use_image(data: bytes) -> str:
    image = srgan._read_image(data)
    assert image.mode in ("RGB", "RGBA") and image.width * image.height <= srgan._MAX_PIXELS
    return "accepted"


def test_the_formats_that_are_fuzzed_are_all_that_are_read():
    assert sorted(IMAGES) == sorted(srgan._FORMATS)


@pytest.mark.parametrize("kind", IMAGES)
def test_fuzz_images(kind):
    exif = Image.Exif()
    exif[274] = 6
    turned = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}
    samples = [face(1, kind, 24, **options, **turned) for options in IMAGES[kind]]
    if kind in ("PNG", "GIF", "TIFF"):  # grey, palette, transparent
        for mode in ("L", "P", "LA" if kind != "GIF" else "1"):
            file = io.BytesIO()
            Image.open(io.BytesIO(samples[0])).convert("RGB").convert(mode).save(file, kind)
            samples.append(file.getvalue())
    if kind == "PPM":
        samples += [b"P3 2 2 255\n" + b"7 " * 12, b"P1 4 4\n" + b"1 " * 16, b"P5 4 4 65535\n" + bytes(32),
                    b"P6 3 3 99\n" + bytes(27)]
    assert all(use_image(sample) == "accepted" for sample in samples)
    fuzz(f"image, {kind}", damaged(samples), lambda data: tried(use_image, data))


def test_fuzz_zips(tmp_path):
    entries = [("a/b.png", face(1, side=64)), ("c.jpg", face(2, "JPEG", 64)), ("d.txt", b"text")]
    path = tmp_path / "deep" / "in.zip"
    path.parent.mkdir()

    def use(data):
        path.write_bytes(data)
        source = srgan.open_source(path)
        for name in source.names[:20]:
            pixels, why, _ = srgan._square(source, name)
            assert is_one_line(why) if pixels is None else pixels.shape == (178, 178, 3)
        return "accepted"

    fuzz("zip", damaged([packed(*entries), packed(*entries, method=zipfile.ZIP_DEFLATED)]), lambda data: tried(use, data))
    assert contents(tmp_path).keys() == {path.parent, path}


def test_fuzz_raw_records(small_store, run, tmp_path):
    """Not one that differs by a byte is taken."""
    samples = [(small_store / "store.json").read_bytes(), (run / "config.json").read_bytes(),
               (run.parent / "backup" / "manifest.json").read_bytes()]
    path = tmp_path / "record.json"

    def check(data):
        path.write_bytes(data)
        answer = tried(lambda: srgan._read_sealed(path, 1, "advice") and "accepted")
        assert answer == "refused" or data in samples
        return answer

    fuzz("sealed JSON, raw", damaged(samples), check)


def test_fuzz_resealed_stores(spare_store):
    record = json.loads((spare_store / "store.json").read_text())
    del record["sha256"]

    def check(value):
        (spare_store / "store.json").write_bytes(resealed(*value))
        return tried(use_store, spare_store)

    fuzz("store.json, resealed", st.tuples(altered(record), st.booleans()), check)


def test_fuzz_resealed_configs(continued, run):
    record = json.loads((run / "config.json").read_text())
    del record["sha256"]
    fuzz("config.json, resealed", altered(record), lambda value: tried(continued, None, resealed(value)))


def test_fuzz_resealed_manifests(run, tmp_path):
    backup = Path(shutil.copytree(run.parent / "backup", tmp_path / "backup"))
    record = json.loads((backup / "manifest.json").read_text())
    del record["sha256"]

    def use():
        found = srgan.newest_checkpoint(tmp_path / "none", backup)
        assert found is None or found["update"] == 6
        writer = srgan.Backup(backup)
        writer.close()
        writer._copy(run / "ckpt" / "update-00000006.pt", 6, [])
        return "accepted"

    def check(value):
        (backup / "manifest.json").write_bytes(resealed(value))
        return tried(use)

    fuzz("manifest.json, resealed", altered(record), check)
    assert {path.name for path in tmp_path.rglob("*") if path.suffix == ".pt"} == set(srgan._SLOTS)


def test_fuzz_checkpoints(tmp_path):
    """Raw damage is always noticed; with the right checksum over it, no more comes out than plain data, or a refusal."""
    path = tmp_path / "update-00000003.pt"
    archive = saved({"format": 1, "update": 3, "generator": {"w": torch.ones(3, 4), "b": torch.zeros(2, dtype=torch.int64)},
                     "history": "step\n", "seconds": 1.5, "config": {"scale": 4, "ema": None, "flip": True}})
    with zipfile.ZipFile(io.BytesIO(archive)) as records:
        pickle = records.read(next(name for name in records.namelist() if name.endswith("data.pkl")))

    def use(data):
        path.write_bytes(data)
        assert isinstance(srgan.load_checkpoint(path), dict)
        return "accepted"

    def check(value):
        kind, data = value
        if kind == "pickle":
            data = sealed(rezipped(archive, change=lambda name, old: data if name.endswith("data.pkl") else old))
        answer = tried(use, sealed(data) if kind == "resealed" else data)
        assert kind != "raw" or answer == "refused" or data == sealed(archive)
        return answer

    kinds = {"raw": damaged([sealed(archive)]), "resealed": damaged([archive]), "pickle": damaged([pickle])}
    for kind, values in kinds.items():
        fuzz(f"checkpoint, {kind}", st.tuples(st.just(kind), values), check)
    assert contents(tmp_path).keys() == {path}


def test_fuzz_resealed_states(continued, run, halfway):
    """Where config.json is there, and where it is lost."""
    configs = st.sampled_from([(run / "config.json").read_bytes(), None])
    fuzz("checkpoint, other values", st.tuples(altered(halfway, ODD_TENSORS), configs),
         lambda value: tried(continued, sealed(saved(value[0])), value[1]))


def test_fuzz_raw_weights(tmp_path, network):
    """What is taken in spite of a change, as of a space in the header, is the same network."""
    tensors, header = network
    path, good = tmp_path / "g.safetensors", weights(tensors, json.dumps(header))

    def use(data):
        path.write_bytes(data)
        generator, config, about = srgan.load_generator(path)
        assert about == header and asdict(config) == header["config"]
        assert all(torch.equal(value, tensors[name]) for name, value in generator.state_dict().items())
        return "accepted"

    fuzz("weights, raw", damaged([good]), lambda data: tried(use, data))


def test_fuzz_resealed_weights(tmp_path, network):
    tensors, header = network
    odd = [None, *(torch.zeros(3, 2).to(kind) for kind in KINDS), torch.zeros(()), torch.zeros(0, 2**40), torch.ones(1).half()]
    names = st.dictionaries(st.sampled_from([*tensors, "more", "a\nb"]), st.sampled_from(odd), max_size=2)

    def check(value):
        told, changes = value
        path = tmp_path / "g.safetensors"
        changed = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
        path.write_bytes(weights(changed, json.dumps(told)))
        return tried(use_weights, path)

    fuzz("weights, other values", st.tuples(altered(header), names), check)
