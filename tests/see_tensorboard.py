"""Open TensorBoard on finished runs in headless Chromium, check that the curves are there, and keep pictures.

    python -m tests.see_tensorboard runs/quickstart-srlora --output seen/

By hand, not part of the tests: it needs a ``chromium`` on the PATH (Debian: ``apt-get install chromium``). Writes one
PNG a tab into ``--output`` and says which tags the server knows.
"""

import argparse
import json
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

from tests.helpers.waiting import wait_until

TABS = ("timeseries", "scalars", "histograms", "images", "text", "hparams")
EXPECTED = ("train/loss", "val/loss", "srlora/directions", "age/initial", "time/step", "memory/peak")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answer(address: str) -> Any:
    """The JSON at ``address``; none while no server is up."""
    try:
        with urllib.request.urlopen(address, timeout=10) as response:
            return json.load(response)
    except OSError:
        return None


def photograph(browser: str, address: str, picture: Path, seconds: int) -> None:
    """A picture of the page, and of what its scripts have drawn after some seconds of the browser's own time."""
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1600,2200",
        f"--virtual-time-budget={seconds * 1000}", f"--screenshot={picture}", address,
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=600)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="a folder of finished runs")
    parser.add_argument("--output", type=Path, default=Path("seen"))
    parser.add_argument("--seconds", type=int, default=30, help="for a page to be drawn")
    arguments = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("no chromium on the PATH: apt-get install chromium")
    arguments.output.mkdir(parents=True, exist_ok=True)
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(arguments.runs), "--port", str(port)]
    server = subprocess.Popen([*command, "--load_fast=false"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: answer(f"{address}/data/runs"), f"runs of TensorBoard at {address}")
        runs = answer(f"{address}/data/runs")
        tags = answer(f"{address}/data/plugin/scalars/tags")
        print(f"{len(runs)} runs: {', '.join(runs)}")
        for run in runs:
            known = set(tags.get(run, {}))
            print(f"{run}: {len(known)} curves, missing: {', '.join(set(EXPECTED) - known) or 'none'}")
        for tab in TABS:
            picture = arguments.output.absolute() / f"{tab}.png"
            photograph(browser, f"{address}/#{tab}", picture, arguments.seconds)
            print(f"{picture}: {picture.stat().st_size:,} bytes")
    finally:
        server.terminate()
        server.wait(timeout=60)
    sys.exit(any(set(EXPECTED) - set(tags.get(run, {})) for run in runs))


if __name__ == "__main__":
    main()
