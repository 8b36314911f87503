"""Run the trajectories and resume the checkpoints with two versions of the package, and demand equal bits.

``python tests/nets/compare.py BASE_FOLDER`` compares the version in BASE_FOLDER with that beside this file: in fp32 and
fp64, and with a plain loop as with one that is made again from compact states. It ends with code 1 where a bit differs.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).parents[2]


def dump(folder: Path, package: Path) -> None:
    """Write each case's tensors into a file in ``folder``, computed with ``package``, the one that is imported here."""
    import srlora_pl

    assert srlora_pl.__file__ is not None
    assert Path(srlora_pl.__file__).parents[1] == package
    sys.path.insert(0, str(ROOT))  # the cases are these, whatever the package
    from tests.helpers import resumed, trajectories

    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.float64):
        for compact in (False, True):
            for name, case in trajectories.CASES.items():
                snapshots = trajectories.run(case, dtype, compact)
                tensors = {f"{key} @ {i}": value for i, each in enumerate(snapshots) for key, value in each.items()}
                how = f"{str(dtype).removeprefix('torch.')} {'compact' if compact else 'plain'}"
                save_file(tensors, folder / f"trajectory {name}, {how}.safetensors")
    with tempfile.TemporaryDirectory() as home:
        resumed.prepare(Path(home))
        for file in resumed.FILES:
            save_file(resumed.resume(file, Path(home)), folder / f"checkpoint {file}, resumed.safetensors")
            scores, merged = resumed.score(resumed.FOLDER / f"{file}.ckpt", Path(home))
            tensors = merged | {name: torch.tensor(value, dtype=torch.float64) for name, value in scores.items()}
            save_file(tensors, folder / f"checkpoint {file}, scored.safetensors")


def run(package: Path, folder: Path) -> None:
    """`dump` in a process of its own, which finds ``package`` and no other."""
    folder.mkdir()
    environment = os.environ | {
        "PYTHONPATH": str(package),
        "XDG_CACHE_HOME": str(folder / "cache"),  # the directions that the other version has found are no help
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, __file__, "--dump", str(folder), str(package)]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, env=environment, timeout=3600, **output)
    if done.returncode:
        sys.exit(f"{done.stdout[-3000:]}\nthe version in {package} has failed")


def compare(ours: Path, theirs: Path) -> tuple[int, list[str]]:
    """How many tensors two files hold, and the names of those that differ."""
    if not (ours.exists() and theirs.exists()):
        return 0, ["one version lacks the case"]
    left, right = load_file(ours), load_file(theirs)
    names = sorted(left.keys() | right.keys())
    return len(names), [name for name in names if not _same(left.get(name), right.get(name))]


def _same(left: Tensor | None, right: Tensor | None) -> bool:
    return left is not None and right is not None and left.dtype == right.dtype and torch.equal(left, right)


def main(base: Path) -> int:
    with tempfile.TemporaryDirectory() as work:
        folders = Path(work, "base"), Path(work, "here")
        run(base.resolve(), folders[0])
        run(ROOT, folders[1])
        cases = sorted({file.name for folder in folders for file in folder.glob("*.safetensors")})
        tensors = wrong = 0
        for case in cases:
            count, names = compare(*(folder / case for folder in folders))
            said = f"{len(names)} differ, such as {', '.join(names[:3])}" if names else "equal"
            print(f"{case.removesuffix('.safetensors')}: {count} tensors, {said}")
            tensors, wrong = tensors + count, wrong + bool(names)
    print(f"{len(cases)} cases, {tensors} tensors: {f'{wrong} cases differ' if wrong else 'all equal to the bit'}")
    return int(wrong > 0 or not cases)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--dump"]:
        dump(*map(Path, sys.argv[2:]))
    elif len(sys.argv) == 2:
        sys.exit(main(Path(sys.argv[1])))
    else:
        sys.exit(__doc__)
