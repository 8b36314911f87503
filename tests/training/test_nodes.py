"""Two nodes on this machine: a launcher each, as `docs/clusters.md` has it, that meet over loopback."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from srlora_pl.cli import main
from tests.helpers.cli import SMALL_RUN
from tests.helpers.paths import ROOT
from tests.helpers.waiting import wait_until

RUN = {"precision": "64-true", "default_root_dir": "runs", "limit_test_batches": 2}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _fit(home: Path, batch_size: int, strategy: str, nodes: int) -> list[str]:
    config = yaml.safe_load(SMALL_RUN)
    config["trainer"] |= RUN
    config["data"]["init_args"] |= {"batch_size": batch_size, "crop_scale": [1.0, 1.0]}
    home.mkdir(exist_ok=True)
    (home / "small.yaml").write_text(yaml.safe_dump(config))
    return ["fit", "--config", "small.yaml", f"--trainer.strategy={strategy}", f"--trainer.num_nodes={nodes}"]


def _environment() -> dict[str, str]:
    set_by_a_run = ("PL_", "SRLORA", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(set_by_a_run)}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}


def _on_two_nodes(home: Path, command: list[str]) -> None:
    environment = _environment()
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1"]
    launcher += [f"--master-port={_free_port()}"]
    said = [home / f"said{node}.txt" for node in (0, 1)]
    nodes = []
    try:
        for node, file in enumerate(said):
            with file.open("w") as output:
                start = [sys.executable, *launcher, f"--node-rank={node}", "-m", "srlora_pl", *command]
                start += ["--trainer.devices=1"]
                nodes.append(
                    subprocess.Popen(
                        start, cwd=home, env=environment, stdout=output, stderr=output, start_new_session=True
                    )
                )
        codes = [node.wait(timeout=600) for node in nodes]
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
    assert codes == [0, 0], "\n".join(file.read_text()[-2000:] for file in said)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_nodes_equal_one_process(tmp_path, monkeypatch, strategy):
    _on_two_nodes(tmp_path / "two", _fit(tmp_path / "two", 16, strategy, 2))
    command = _fit(tmp_path / "one", 32, "auto", 1)
    monkeypatch.chdir(tmp_path / "one")
    assert main([*command, "--trainer.devices=1"]) == 0
    one, two = (
        torch.load(tmp_path / each / "runs/small-srlora/version_0/checkpoints/last.ckpt", weights_only=True)
        for each in ("one", "two")
    )
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, value in one["state_dict"].items():
        assert torch.allclose(value, two["state_dict"][name], rtol=0, atol=1e-9), name
    ranks = [[matrix["rank"] for matrix in each["srlora"]["matrices"].values()] for each in (one, two)]
    assert ranks[0] == ranks[1]
    assert sum(ranks[0])  # it has switched
    assert [path.name for path in (tmp_path / "two/runs/small-srlora").iterdir()] == ["version_0"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_with_split_weights_goes_on(tmp_path, number):
    """By its last file, to the bit: of two processes on one node."""
    homes = {name: tmp_path / name for name in ("whole", "killed")}
    commands = {name: [*_fit(home, 16, "fsdp2", 1), "--trainer.devices=2"] for name, home in homes.items()}
    assert _run(homes["whole"], commands["whole"]).wait(600) == 0
    run = _run(homes["killed"], commands["killed"])
    last = homes["killed"] / "runs/small-srlora/version_0/checkpoints/last.ckpt"
    wait_until(lambda: last.exists() or run.poll() is not None, "the first checkpoint")
    os.killpg(run.pid, number)
    assert run.wait(300) in (-number, 128 + number), (homes["killed"] / "said.txt").read_text()
    assert torch.load(last, weights_only=True)["global_step"] < 12
    assert _run(homes["killed"], [*commands["killed"], "--ckpt_path=last"]).wait(600) == 0
    whole, killed = (
        torch.load(home / "runs/small-srlora/version_0/checkpoints/last.ckpt", weights_only=True)
        for home in homes.values()
    )
    assert whole["global_step"] == killed["global_step"] == 12
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, killed["state_dict"][name]), name


def _run(home: Path, command: list[str]) -> subprocess.Popen:
    with (home / "said.txt").open("a") as output:
        start = [sys.executable, "-m", "srlora_pl", *command]
        environment = _environment()
        return subprocess.Popen(start, cwd=home, env=environment, stdout=output, stderr=output, start_new_session=True)
