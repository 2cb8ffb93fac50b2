"""The tree stays easy to enter: what a module reaches, names that mean one file, tests beside their module."""

from pathlib import Path

import house
from house import ROOT


def test_training_reaches_no_more_than_it_needs() -> None:
    found = house.reached(ROOT, ["train.training.unet"])
    rooms = {path.relative_to(ROOT).parts[:2] for path in found}
    assert len(found) <= 95
    assert not rooms & {("train", room) for room in ("evaluation", "sampling", "editing", "board", "stages")}


def test_a_file_name_in_train_means_one_file() -> None:
    assert house.recurring_files(ROOT, "train") == {}


def test_an_experiment_is_one_file() -> None:
    assert set(house.files_of_experiment(ROOT).values()) == {1}


def test_tests_stand_where_their_module_does() -> None:
    lost = [str(test.relative_to(ROOT)) for test in house.tests_of_modules(ROOT) if not house.mirrors(ROOT, test)]
    assert lost == []


def test_counts_are_those_of_a_tree_that_is_known(tmp_path: Path) -> None:
    """Three modules, one of which nobody imports; a twin by name, and an entry script of the same name."""
    files = {
        "train/__init__.py": "",
        "train/sample.py": '@entry("sample")\ndef main():\n    from train.sampling.run import sample\n',
        "train/sampling/__init__.py": "",
        "train/sampling/run.py": "from data import order\nimport data.order\n\ndef sample(): ...\n",
        "train/sampling/sample.py": "class Row: ...\n",
        "data/order.py": "# why\nclass Row:\n    def at(self): ...\n",
        "data/sample.py": "",
        "models/run.py": "",
        "conf/experiment/demo.yaml": "",
        "conf/task/demo/more.yaml": "",
        "tests/train/sampling/test_run.py": "",
        "tests/train/test_order.py": "",
        "tests/integration/test_all.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    names = {str(path.relative_to(tmp_path)) for path in house.reached(tmp_path, ["train.sample"])}
    expected = {"train/__init__.py", "train/sample.py", "train/sampling/__init__.py", "train/sampling/run.py"}
    assert names == expected | {"data/order.py"}
    assert house.functions([tmp_path / "data/order.py", tmp_path / "train/sample.py"]) == 2
    assert house.recurring_files(tmp_path) == {"sample.py": 2}
    assert house.recurring_classes(tmp_path) == {"Row": 2}
    counts = house.table(tmp_path)
    assert counts["files of one experiment, at most"] == 2
    assert (counts["test files"], counts["test files that mirror a module"]) == (2, 1)
    assert (counts["modules"], counts["full-line comments"]) == (8, 1)
