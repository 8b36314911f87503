"""The user's own folders of images: one folder per class to train on, or any folder to predict.

Links to folders are followed. Files and folders that are not used are counted by their kind.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

from torch import tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from srlora_pl.data.images.pictures import Files, Source, Split
from srlora_pl.data.splits import split_of, split_word
from srlora_pl.util.errors import UserError, did_you_mean, is_utf8, listed

# Folders for thumbnails and deleted files that systems and programs make beside pictures.
_JUNK = ("__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information")


class Folder(Source):
    """A folder of class folders, or ``train/``, ``val/`` and ``test/`` (see `split_of`) with class folders in each.

    Without ``train/`` the whole tree is the training split. A ``test/`` of bare images has no labels.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.splits: dict[str, Path] = _split_folders(root)
        train = self.splits["train"]
        self.class_names = _folders(train)
        if not self.class_names:
            raise UserError(
                f"data.root '{root}' has no class folders with images; put the images of each class into a "
                f"folder of its own, under '{root}' or '{root / 'train'}'."
            )
        for name in self.class_names:
            if not is_utf8(name):
                raise UserError(f"The class folder {name!r} in '{train}' is not named in UTF-8; rename it.")

    def has_labels(self, split: str) -> bool:
        return split in self.splits and bool(_folders(self.splits[split]))

    def load(self, split: str) -> Split:
        folder = self.splits[split]
        if split == "test" and not self.has_labels(split):
            return picture_files(folder, "data.root")
        self._check_classes(folder)
        left_out = self._beside_classes(split)
        above = frozenset({os.path.realpath(folder)})
        by_class = [_images_under(folder / name, left_out, above) for name in self.class_names]
        empty = [name for name, paths in zip(self.class_names, by_class, strict=True) if not paths]
        if empty and (split == "train" or not any(by_class)):
            raise UserError(
                f"The class folder '{folder / empty[0]}' holds no images, which end in {listed(IMG_EXTENSIONS)}; fill "
                f"or remove it."
            )
        labels = [label for label, paths in enumerate(by_class) for _ in paths]
        files = Files([path for paths in by_class for path in paths])
        return Split(files, tensor(labels), files.name, left_out)

    def _check_classes(self, folder: Path) -> None:
        train, classes = self.splits["train"], _folders(folder)
        if not classes:
            raise UserError(f"'{folder}' has no class folders; give it those of '{train}', or remove it.")
        if unknown := [name for name in classes if name not in self.class_names]:
            raise UserError(
                f"'{folder}' has the class {unknown[0]!r}, which '{train}' does not have"
                f"{did_you_mean(unknown[0], self.class_names)}; rename or remove it."
            )

    def _beside_classes(self, split: str) -> Counter[str]:
        """The entries beside the class folders of a split, and for ``train`` also those beside the split folders."""
        left_out: Counter[str] = Counter()
        folder = self.splits[split]
        for _, is_folder in _entries(folder, left_out):
            left_out["outside the class folders"] += not is_folder
        if split == "train" and folder != self.root:
            for name, is_folder in _entries(self.root, left_out):
                if self.root / name not in self.splits.values():
                    left_out[f"folder {name!r}" if is_folder else "outside the class folders"] += 1
        return +left_out


def _split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split."""
    names = _folders(root)
    named: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if split := split_of(name):
            named[split].append(name)
    if any(_folders(root / name) for name in named["train"]):
        for split, found in named.items():
            if len(found) > 1:
                raise UserError(
                    f"data.root '{root}' has {len(found)} folders for the split {split} ({listed(found)}); keep one."
                )
        return {split: root / found[0] for split, found in named.items() if found}
    # A class may well be called train or test, but not all of them; nor seg_train where it holds folders of its own.
    hints = all(map(split_word, names)) and any(_folders(root / name) for name in names)
    if names and (hints or all(map(split_of, names))):
        raise UserError(
            f"data.root '{root}' has folders of splits ({listed(names)}) but no class folders to train on; put the "
            f"images of each class into a folder of its own in '{root / 'train'}'."
        )
    for name in filter(split_of, names):
        if again := [each for each in _folders(root / name) if each in names]:
            raise UserError(
                f"data.root '{root}' has the folder {again[0]!r}, and its folder {name!r} has one of this name too; "
                f"move the class folders to train on into '{root / 'train'}'."
            )
    return {"train": root}


def picture_files(root: Path, key: str) -> Split:
    """All images under a folder, or one file, without labels; errors name the setting ``key``."""
    if not root.exists():
        raise UserError(f"{key} '{root}' does not exist; give a folder of images or one image file.")
    left_out: Counter[str] = Counter()
    files = Files([root] if root.is_file() else _images_under(root, left_out))
    if not len(files):
        raise UserError(f"{key} '{root}' holds no images; it needs files that end in {listed(IMG_EXTENSIONS)}.")
    return Split(files, None, files.name, left_out)


def _folders(root: Path) -> list[str]:
    """Names of the folders in ``root``, sorted; none if ``root`` does not exist."""
    return [name for name, is_folder in _entries(root, Counter()) if is_folder]


def _images_under(root: Path, left_out: Counter[str], above: frozenset[str] = frozenset()) -> list[Path]:
    """The images below ``root``, sorted; ``above``: folders that no link may lead back to."""
    here = os.path.realpath(root)
    if here in above:
        left_out["link in a circle"] += 1
        return []
    found = []
    for name, is_folder in _entries(root, left_out):
        if is_folder:
            found += _images_under(root / name, left_out, above | {here})
        else:
            found.append(root / name)
    return found


def _entries(root: Path, left_out: Counter[str]) -> list[tuple[str, bool]]:
    """Names of the images and the folders in ``root``, sorted, and whether each is a folder."""
    try:
        with os.scandir(root) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError:
        left_out["unreadable folder"] += 1
        return []
    found = []
    for entry in entries:
        if entry.name.startswith(".") or entry.name.casefold() in _JUNK:
            left_out["hidden"] += 1
        elif _leads_to(entry.is_dir):
            found.append((entry.name, True))
        elif not _leads_to(entry.is_file):
            left_out["broken link" if entry.is_symlink() else "no regular file"] += 1
        elif (ending := Path(entry.name).suffix.lower()) in IMG_EXTENSIONS:
            found.append((entry.name, False))
        else:
            left_out[ending or "without an ending"] += 1
    return found


def _leads_to(check: Callable[[], bool]) -> bool:
    """Whether an entry is of a kind; a link in a circle or through a closed folder has none."""
    try:
        return check()
    except OSError:
        return False
