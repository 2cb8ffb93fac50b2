"""All stages from one command, each a process of its own; a second start skips what is done and continues the rest.

python train/pipeline.py experiment=demo
python train/pipeline.py experiment=demo run_dir=runs/other seed=1 processes=2 unet.optim.lr=1e-4 wandb.mode=disabled

STAGE.option=value is for one stage (build, autoencoder, clip, latents, unet, sample, evaluate); option=value, where it
is not the pipeline's own, for every stage that has this option. All stages are checked before the first one starts.
"""

import sys

from conf.ending import fail
from conf.entry import entry
from conf.errors import UserError
from conf.schema import PipelineRun
from train.stages.run import run_stages
from train.stages.tasks import separate


def command() -> None:
    """Hydra sees the pipeline's own options only; those of the stages it would refuse."""
    try:
        own, overrides = separate(sys.argv[1:])
    except UserError as error:
        fail(error)
    sys.argv[1:] = own

    @entry("pipeline", PipelineRun)
    def main(cfg: PipelineRun) -> None:
        sys.exit(run_stages(cfg, overrides))

    main()


if __name__ == "__main__":
    command()
