"""Where the runs of a config are looked for."""

from pathlib import Path

import pytest

from srlora_pl.run.folders import own_or_all


@pytest.mark.parametrize("place", [".", "elsewhere"])
def test_the_config_of_a_run_leads_to_that_run_from_any_folder(place, tmp_path, monkeypatch):
    runs = tmp_path / "runs/small-lora"
    for name in ("version_0", "version_1"):
        (runs / name).mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / place)
    config = str(runs / "version_0/config.yaml")
    assert own_or_all(config, Path("runs/small-lora")) == [runs / "version_0"]
    assert own_or_all(config, runs) == [runs / "version_0"]
    assert runs / "version_0" not in own_or_all(config, Path("runs/other-lora"))  # another --name is another run
    assert runs / "version_0" not in own_or_all(config, tmp_path / "other/small-lora")
