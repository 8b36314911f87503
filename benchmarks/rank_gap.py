"""Whether rank binds: what a larger rank of LoRA gains on a task, each rank at its own best learning rate.

    python -m benchmarks.rank_gap --config configs/vit_tiny_cifar100_srlora.yaml --ranks 1,2,4,8,32 \
        --rates 0.002,0.004 --seeds 3 --output runs/rank_gap --trainer.val_check_interval 600

The gap of a rank is its test loss less that of the largest rank of the list, seed by seed. Rank binds where the gap is
above three standard deviations of these differences; there SRLoRA is worth a try, elsewhere LoRA is the method to take.
The scaling is 1 at every rank. All other options are for every run, as with ``srlora compare``; take a last validation
at the end of training, which chooses the rates (see `benchmarks.search`).
"""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.report import report
from benchmarks.search import Search, parser, plan_of, rates_of
from srlora_pl.comparison.cells import comparing_in

BINDS = 3  # standard deviations


def rank_of(search: Search, rank: int, rates: Sequence[float]) -> dict[str, Any]:
    """LoRA of ``rank``: its best rate, test losses by seed, and the effective rank of W_eff - W0 at the end."""
    best = search.best(rates)
    last = search.outcome(best, search.plan.seeds[0]).metrics[::-1]
    sizes = next((row for row in last if any(key.startswith("change_effective_rank/") for key in row)), {})
    effective = [value for key, value in sizes.items() if key.startswith("change_effective_rank/")]
    return {
        "rank": rank,
        "rate": best,
        "test_losses": search.test_losses(best),
        "effective_rank": statistics.fmean(effective) if effective else None,
    }


def gap(losses: Sequence[float], best: Sequence[float]) -> tuple[float, float]:
    """The mean and the standard deviation of the differences by seed."""
    differences = [one - other for one, other in zip(losses, best, strict=True)]
    return statistics.fmean(differences), statistics.stdev(differences)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--ranks", default="1,2,4,8,32", help="with commas between")
    given, options = made.parse_known_args()
    plan, rates = plan_of(given, options), rates_of(given.rates)
    (method,) = plan.methods
    found: list[dict[str, Any]] = []
    with comparing_in(plan.folder) as held:
        for rank in sorted(map(int, given.ranks.split(","))):
            point = (("model.method.rank", str(rank)), ("model.method.alpha", str(float(rank))))
            found.append(rank_of(Search(plan, method, point, held), rank, rates))
            print(found[-1], flush=True)
            rates = [found[-1]["rate"] / 2, found[-1]["rate"]]  # larger ranks want smaller steps, if any others
    rows = []
    for each in found:
        mean, deviation = gap(each["test_losses"], found[-1]["test_losses"])
        each |= {"gap": mean, "deviation": deviation, "binds": mean > BINDS * deviation}
        verdict = "" if each is found[-1] else "rank binds" if each["binds"] else "rank does not bind"
        mean_loss = f"{statistics.fmean(each['test_losses']):.4f}"
        cells = [f"{value:.4f}" for value in (mean, deviation)]
        rows.append([each["rank"], each["rate"], mean_loss, *cells, each["effective_rank"] or "-", verdict])
    header = ("rank", "best rate", "test loss", "gap", "deviation", "effective rank", "verdict")
    report(f"{method} on {', '.join(given.config)}, {given.seeds} seeds", header, rows, {"ranks": found})


if __name__ == "__main__":
    main()
