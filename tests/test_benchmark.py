"""The benchmark runs, and writes what it promises. (Its speeds are nobody's test.)"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).with_name("benchmark.py")


def test_the_training_benchmark_writes_its_rows(tmp_path):
    command = ["train", "--hr-size", "32", "--batch", "2", "--rounds", "1", "--seconds", "0", "--without"]
    done = subprocess.run([sys.executable, BENCHMARK, *command, "--json", tmp_path / "rows.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    machine, about, reference, ours = json.loads((tmp_path / "rows.json").read_text())
    assert {"torch", "python", "device", "machine"} <= machine.keys() and done.stdout.count(machine["torch"]) == 1
    assert [about[name] for name in ("preset", "scale", "px", "batch")] == ["report", 4, 32, 2]
    assert ours["times_the_reference"] == pytest.approx(ours["updates_per_s"] / reference["updates_per_s"])
    # an update of a face of 256 px is 222 GFLOP (two for each multiplication); one of 32 px has a 64th of its pixels
    assert 2 * 222e9 / 64 * 0.9 < about["flop_per_update"] < 2 * 222e9 / 64 * 1.1
    assert "images_per_s" in done.stdout
