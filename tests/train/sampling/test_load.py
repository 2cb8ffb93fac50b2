"""A model from a folder: the one that the command would draw with, wherever the folder lies."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from conf.errors import UserError
from train.engine.runtime import Runtime
from train.sampling.load import load, load_model
from train.sampling.run import generate_images

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("page", ["README.md", "docs/sampling.md"])
def test_lines_of_the_docs_draw(project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str) -> None:
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(project.folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(lines, names)
    assert names["images"].shape == (2, 3, 32, 32)
    with Image.open("images.png") as sheet:
        assert sheet.width > 64 and len(sheet.convert("L").getcolors() or range(999)) > 9


def test_run_that_was_moved_draws_as_the_command_does(project: Any, runtime: Runtime, tmp_path: Path) -> None:
    cfg = project.config("sample", "prompts=[a moon]")
    expected = generate_images(load_model(cfg, runtime.device), cfg, [{"caption": "a moon"}], [0]).images
    for part in ("unet/export", "unet/config.yaml", "autoencoder/export", "clip/export"):
        copy = shutil.copytree if (project.folder / part).is_dir() else shutil.copyfile
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        copy(project.folder / part, tmp_path / part)
    assert torch.equal(load(tmp_path)(["a moon"], [cfg.seed], cfg), expected)
    shutil.rmtree(tmp_path / "clip")
    with pytest.raises(UserError, match=rf"{tmp_path}/clip/export"):
        load(tmp_path)


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds neither model_index\.json nor unet/config\.yaml; name a run"):
        load(tmp_path)
