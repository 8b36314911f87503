"""Every method on the quickstart: test accuracy, trained parameters and seconds, beside LoRA and the linear probe.

    python -m benchmarks.quickstart_table --output runs/quickstart_table
    python -m benchmarks.quickstart_table --output runs/own_rate --grid --trainer.max_steps 120

``python cli.py compare`` trains the methods of all overlays in ``configs/methods``, each at the rates of its grid, of
which validation chooses; runs that are there already are not repeated. Without a value ``--grid`` means the config's
own rates. Methods for texts alone are named above the table, in the words in which they refuse the network.
"""

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

if not __package__:  # run as a file, whose folder holds a kernels.py that transformers would take for a package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.report import report
from benchmarks.step_time import method_of, network
from srlora_pl import cli
from srlora_pl.lowrank import Adaptation
from srlora_pl.util.errors import UserError
from srlora_pl.util.system import REPOSITORY

GRID = [
    "adalora.model.lr=0.005,0.01,0.02",
    "bitfit.model.lr=0.003,0.01,0.03",
    "bottleneck.model.lr=0.001,0.002,0.005",
    "dora.model.lr=0.003,0.006,0.012",
    "dylora.model.lr=0.001,0.002,0.005",
    "full.model.lr=0.0003,0.001,0.002",
    "galore.model.lr=0.0003,0.001,0.002",
    "hydralora.model.lr=0.001,0.003,0.01",
    "linear_probe.model.head_lr=0.02,0.05,0.1",
    "lora.model.lr=0.003,0.006,0.012",
    "lora_ga.model.lr=0.001,0.003,0.01",
    "lora_plus.model.lr=0.0005,0.001,0.002",
    "lora_pro.model.lr=0.0005,0.001,0.002",
    "lora_sb.model.lr=0.005,0.01,0.03",
    "lora_xs.model.lr=0.005,0.01,0.02",
    "peft_ia3.model.lr=0.01,0.03,0.1",
    "pissa.model.lr=0.001,0.002,0.005",
    "relora.model.lr=0.002,0.005,0.01",
    "rslora.model.lr=0.001,0.002,0.004",
    "srlora.model.lr=0.001,0.002,0.005",
    "tied_lora.model.lr=0.003,0.01,0.03",
    "vera.model.lr=0.03,0.1,0.2",
]
BESIDE = ("lora", "linear_probe")


def refusals(methods: Iterable[str]) -> dict[str, str]:
    """What those of ``methods`` say that cannot adapt an image network."""
    net, _ = network("vit_tiny")
    said = {}
    for name in methods:
        try:
            Adaptation(copy.deepcopy(net), method_of(name), ["head"])
        except UserError as error:
            said[name] = str(error)
    return said


def rows(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By method: the means over the seeds of its chosen point, accuracies in percent.

    Args:
        results: of `compare`'s results.json.
    """
    found = {}
    for method, point in results["chosen"].items():
        runs = [run for run in results["runs"] if run["method"] == method and point.items() <= run.items()]
        found[method] = {
            "chosen": ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in point.items()) or "-",
            "accuracy": 100 * statistics.fmean(run["test/accuracy"] for run in runs),
            "trained": runs[0]["trained parameters"],
            "seconds": statistics.fmean(run["seconds"] for run in runs),
        }
    for other in BESIDE:
        for row in found.values():
            row[f"over {other}"] = row["accuracy"] - found[other]["accuracy"] if other in found else None
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(REPOSITORY / "configs" / "quickstart.yaml"), help="of images")
    parser.add_argument("--methods", nargs="+", help="by default all; LoRA and the linear probe come with them")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--grid", nargs="*", default=GRID, help="as compare takes it, in place of the file's own")
    parser.add_argument("--output", required=True)
    arguments, options = parser.parse_known_args()
    overlays = sorted(file.stem for file in (REPOSITORY / "configs" / "methods").glob("*.yaml"))
    methods = list(dict.fromkeys([*BESIDE, *(arguments.methods or overlays)]))
    refused = refusals(methods)
    methods = [name for name in methods if name not in refused]
    grid = [entry for entry in arguments.grid if entry.partition(".")[0] in ("model", "data", "trainer", *methods)]
    code = cli.main([
        "compare", "--config", arguments.config, "--methods", ",".join(methods), "--seeds", str(arguments.seeds),
        "--output", arguments.output, *options, *(["--grid", *grid] if grid else []),
    ])  # fmt: skip
    file = Path(arguments.output, "results.json")
    if code > 1 or not file.is_file():
        return code
    results = json.loads(file.read_text())
    table = rows(results)
    print(*(f"{method} is left out: {sentence}" for method, sentence in refused.items()), sep="\n")
    header = ["method", "chosen", "test accuracy, %", *(f"over {other}" for other in BESIDE), "trained", "seconds"]
    report(
        f"{arguments.config}, seeds {arguments.seeds}, {', '.join(results['devices'])}",
        header,
        [
            [
                method,
                row["chosen"],
                f"{row['accuracy']:.2f}",
                *("-" if (far := row[f"over {other}"]) is None else f"{far:+.2f}" for other in BESIDE),
                f"{row['trained']:,}",
                f"{row['seconds']:.0f}",
            ]
            for method, row in sorted(table.items(), key=lambda item: -item[1]["accuracy"])
        ],
        {
            "benchmark": "quickstart_table",
            "arguments": {**vars(arguments), "options": options},
            "devices": results["devices"],
            "methods": table,
            "refused": refused,
        },
    )
    return code


if __name__ == "__main__":
    sys.exit(main())
