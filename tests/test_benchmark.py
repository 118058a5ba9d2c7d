"""The benchmark runs, and writes what it promises. (Its speeds are nobody's test.)"""

import json

import benchmark
import pytest

import srgan_utils as srgan


def test_the_training_benchmark_compares_with_the_reports_way_and_with_another_version(tmp_path, monkeypatch, capsys):
    given = ["train", "--hr-size", "32", "--batch", "2", "--rounds", "1", "--seconds", "0", "--beside", srgan.__file__]
    monkeypatch.setattr("sys.argv", ["benchmark.py", *given, "--json", str(tmp_path / "rows.json")])
    benchmark.main()
    (machine, about, *rows), told = json.loads((tmp_path / "rows.json").read_text()), capsys.readouterr().out
    assert {"torch", "python", "device", "machine"} <= machine.keys() and told.count(machine["torch"]) == 1
    assert [about[name] for name in ("preset", "scale", "px", "batch")] == ["report", 4, 32, 2]
    assert [row["way"] for row in rows] == ["reference", "ours", "beside, whole", "ours, whole"]
    assert rows[1]["times_the_first"] == pytest.approx(rows[1]["per_s"] / rows[0]["per_s"]) and "images_per_s" in told
    # an update of a face of 256 px is 222 GFLOP (two for each multiplication); one of 32 px has a 64th of its pixels
    assert 2 * 222e9 / 64 * 0.9 < about["flop_per_update"] < 2 * 222e9 / 64 * 1.1
