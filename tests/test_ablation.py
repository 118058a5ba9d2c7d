"""The ablation's rows are runs that `train` takes, each with one choice changed."""

import ablation
import pytest
from conftest import TINY

import srgan_utils as srgan


def test_every_row_is_another_run():
    configs = {name: srgan.Config.preset("sharp", **(ablation.BASE | changes)) for name, changes in ablation.rows().items()}
    assert len(configs) > 12 and all(config.scale == 8 and config.total_steps == 1_500 for config in configs.values())
    assert len({str(config) for config in configs.values()}) == len(configs)


def test_a_row_is_trained_once_and_measured(store, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "BASE", TINY | {"scale": 2})
    found = ablation.measured(store, tmp_path / "row", {})
    assert set(ablation.COLUMNS) <= found["generator"].keys() and found["generator"] != found["pretrained"]
    ckpt = {path: path.stat().st_mtime for path in (tmp_path / "row" / "ckpt").iterdir()}
    assert ablation.measured(store, tmp_path / "row", {})["generator"] == pytest.approx(found["generator"])
    assert {path: path.stat().st_mtime for path in (tmp_path / "row" / "ckpt").iterdir()} == ckpt
