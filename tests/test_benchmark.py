"""The benchmark runs, and writes what it promises. (Its speeds are nobody's test.)"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).with_name("benchmark.py")


def test_the_training_benchmark_writes_its_rows(tmp_path):
    command = ["train", "--hr-size", "32", "--batch", "2", "--rounds", "1", "--seconds", "0", "--without"]
    done = subprocess.run([sys.executable, BENCHMARK, *command, "--json", tmp_path / "rows.json"], capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    row, = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {name: row[name] for name in ("preset", "scale", "hr_size", "batch", "vgg")} == {
        "preset": "report", "scale": 4, "hr_size": 32, "batch": 2, "vgg": "random"}
    assert row["ratio"] == pytest.approx(row["ours"]["updates_per_s"] / row["reference"]["updates_per_s"])
    # an update of a face of 256 px is 222 GFLOP (two for each multiplication); one of 32 px has a 64th of its pixels
    assert 2 * 222e9 / 64 * 0.9 < row["flop_per_update"] < 2 * 222e9 / 64 * 1.1
    assert "images/s" in done.stdout
