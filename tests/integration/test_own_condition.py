"""The worked example of docs/conditions.md, done in a copy of the project."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import numpy as np, torch
from conf.entry import compose
from conf.schema import UNetRun
from models.conditions import ConditionContext, Conditions, Embedders, Samples
from models.denoiser import Denoiser
from models.unet import UNet

overrides = ["experiment=smoke", "conditions.caption=null", "conditions.mean_colour.drop=0.5"]
overrides += ["model.cross_attention_dim=null"]
overrides += ["model.down_block_types=[DownBlock2D,AttnDownBlock2D]", "model.up_block_types=[AttnUpBlock2D,UpBlock2D]"]
cfg = compose("train_unet", UNetRun, overrides)
context = ConditionContext.of(cfg.model, downscale=4, latent_mean=torch.zeros(4), latent_std=torch.ones(4))
conditions = Conditions(cfg.conditions)
network = Denoiser(UNet(cfg.model), Embedders(conditions, context))
colours = torch.linspace(-1, 1, 16).view(16, 1, 1, 1).expand(-1, 3, 32, 32)
samples = Samples(colours, [], torch.zeros(16, 4), [])
inputs = conditions.prepare(samples, None)
z = colours[:, :1, :8, :8].expand(-1, 4, -1, -1)  # a latent that the colour alone decides
optimizer, noise = torch.optim.Adam(network.parameters(), 3e-3), torch.randn(16, 4, 8, 8)

def loss(inputs):
    return (network(noise, torch.full((16,), 999.0), inputs) - z).square().mean()

for _ in range(25):
    optimizer.zero_grad()
    loss(inputs).backward()
    optimizer.step()
print(float(loss(inputs)), float(loss(network.conditions.null(inputs))))
"""


def after(path: Path, place: str, text: str) -> None:
    source = path.read_text()
    assert source.count(place) == 1
    path.write_text(source.replace(place, place + text))


def test_example_of_the_docs_works(tmp_path: Path) -> None:
    for folder in ("conf", "models"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "conditions.md").read_text(), re.DOTALL)
    condition, kind, section, option = blocks
    images, schema = tmp_path / "models/conditions/images.py", tmp_path / "conf/schema/conditions.py"
    after(images, "KINDS: Mapping[str, tuple[type[Condition], type[Embedder]]] = {\n", kind)
    images.write_text(
        images.read_text().replace("\n\nclass LowResolution(", f"\n\n{condition}\n\nclass LowResolution(")
    )
    after(schema, "    segments: SegmentsConfig | None = None\n", option)
    schema.write_text(
        schema.read_text().replace(
            "\n\n@dataclass(kw_only=True, slots=True)\nclass ConditionsConfig",
            f"\n\n{section}\n\n@dataclass(kw_only=True, slots=True)\nclass ConditionsConfig",
        )
    )
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env={"PYTHONPATH": "."}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told, nothing = map(float, done.stdout.split()[-2:])
    assert told < 0.1 < 0.2 < nothing  # it has learnt from the colour, and without it knows nothing
