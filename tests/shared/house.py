"""How easy the tree is to enter, in numbers: `python tests/shared/house.py [FOLDER …]`, a column for each checkout."""

import ast
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("conf", "data", "models", "train")
MAY_RECUR = {"__init__.py", "run.py"}  # names that say the same in every folder
ROUTES = {  # what somebody follows who reads it for the first time; names of before and after a module moved
    "a caption from a shard to the loss": {
        *("data.building.build", "train.training.unet", "train.latents.precompute"),
        *("train.stages.unet", "train.stages.latents"),
    },
    "train/sample.py to PNG": {"train.sample"},
    "a training of the U-Net": {"train.training.unet", "train.stages.unet"},
}


def sources(root: Path, *rooms: str) -> list[Path]:
    """All modules of some rooms, or of the whole library."""
    return sorted(path for room in rooms or ROOMS for path in (root / room).rglob("*.py"))


def modules(root: Path) -> dict[str, Path]:
    """The file of each dotted name; that of a package is its `__init__`."""
    paths = {path: path.relative_to(root).with_suffix("") for path in sources(root)}
    return {".".join(name.parts).removesuffix(".__init__"): path for path, name in paths.items()}


def imported(path: Path) -> Iterator[str]:
    """All dotted names that the imports of a file could load."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name}" for name in names]
        for parts in (name.split(".") for name in names):
            yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def reached(root: Path, starts: Iterable[str]) -> set[Path]:
    """All files that some modules import, directly or through others; they themselves and packages on the way, too."""
    known = modules(root)
    found, waiting = set[str](), {name for name in starts if name in known}
    while waiting:
        found |= waiting
        waiting = {other for name in waiting for other in imported(known[name]) if other in known} - found
    return {known[name] for name in found}


def functions(paths: Iterable[Path]) -> int:
    """Functions and methods in some files."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return sum(isinstance(node, kinds) for path in paths for node in ast.walk(ast.parse(path.read_text())))


def recurring_files(root: Path, *rooms: str) -> dict[str, int]:
    """File names that stand in several folders, where the name alone does not say which one is meant.

    An entry script does not count: it bears the name of what it starts.
    """
    entries = {path for room in ROOMS for path in (root / room).glob("*.py") if "@entry(" in path.read_text()}
    counts = Counter(path.name for path in sources(root, *rooms) if path not in entries and path.name not in MAY_RECUR)
    return {name: count for name, count in counts.items() if count > 1}


def recurring_classes(root: Path) -> dict[str, int]:
    """Names of public classes that are defined in several files."""
    counts = Counter(
        node.name
        for path in sources(root)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    return {name: count for name, count in counts.items() if count > 1}


def files_of_experiment(root: Path) -> dict[str, int]:
    """For each experiment the YAML files that are its own."""
    conf = root / "conf"
    names = [path.stem for path in (conf / "experiment").glob("*.yaml")]
    homes = [path for room in ("experiment", "stage", "subject", "task") for path in (conf / room).rglob("*.yaml")]
    return {name: sum(name in (path.stem, path.parent.name) for path in homes) for name in names}


def tests_of_modules(root: Path) -> list[Path]:
    """Test files, without those of `integration/`, which are of several modules."""
    found = sorted((root / "tests").rglob("test_*.py"))
    return [path for path in found if not path.is_relative_to(root / "tests" / "integration")]


def mirrors(root: Path, test: Path) -> bool:
    """Whether a test file stands where its module does: `tests/A/test_NAME.py` or `tests/A/test_NAME_PART.py`."""
    folder, name = root / test.parent.relative_to(root / "tests"), test.stem.removeprefix("test_")
    words = name.split("_")
    parts = ["_".join(words[:end]) for end in range(1, len(words) + 1)]
    at_home = {folder / f"{mark}{part}.py" for part in parts for mark in ("", "_")} | {folder / part for part in parts}
    beside = test.with_name(f"{name}.py")  # a module of the tests themselves
    return folder.name == name or beside.exists() or any(path.exists() for path in at_home)


def table(root: Path) -> dict[str, int]:
    """Everything that is counted, by what it is called."""
    lines = [line.strip() for path in sources(root) for line in path.read_text().splitlines()]
    tests = tests_of_modules(root)
    counts = {}
    for route, starts in ROUTES.items():
        files = reached(root, starts)
        counts |= {f"{route}: files reached by imports": len(files), f"{route}: functions in them": functions(files)}
    return counts | {
        "file names that occur twice in train/": len(recurring_files(root, "train")),
        "file names that occur twice": len(recurring_files(root)),
        "class names that occur twice": len(recurring_classes(root)),
        "files of one experiment, at most": max(files_of_experiment(root).values()),
        "experiments": len(files_of_experiment(root)),
        "test files": len(tests),
        "test files that mirror a module": sum(mirrors(root, test) for test in tests),
        "modules": len(sources(root)),
        "lines of source": len(lines),
        "full-line comments": sum(line.startswith("#") and not line.startswith("# ---") for line in lines),
        "YAML files": len(list((root / "conf").rglob("*.yaml"))),
    }


def main(roots: list[Path]) -> None:
    """Print a line for each number and a column for each checkout."""
    tables = [table(root) for root in roots]
    for name in tables[0]:
        print(f"{name:65}", *(f"{counts[name]:8,}" for counts in tables))


if __name__ == "__main__":
    main([Path(folder).resolve() for folder in sys.argv[1:]] or [ROOT])
