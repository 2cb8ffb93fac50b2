"""Build image-text shards from any source.

python data/build_shards.py source=demo samples=6000 resolution=64
python data/build_shards.py source=folder path=~/photos resolution=512 format=webp
"""

from conf.entry import entry
from conf.schema import BuildRun


@entry("build_shards", BuildRun)
def main(cfg: BuildRun) -> None:
    """Write `train/` and `heldout/` below `cfg.output_dir`, or find them there."""
    from data.building.build import build_shards

    build_shards(cfg)


if __name__ == "__main__":
    main()
