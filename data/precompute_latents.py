"""Encode image-text shards once to latents: `python data/precompute_latents.py run_dir=...` (README, step 4)."""

from conf.entry import entry, to_plain
from conf.schema import PrecomputeRun


@entry("precompute_latents", PrecomputeRun)
def main(cfg: PrecomputeRun) -> None:
    """Heavy imports wait until the configuration is known to be sound."""
    from train.engine.runtime import start, stop
    from train.latents.precompute import run_precompute

    run_precompute(cfg, start(cfg.runtime), to_plain(cfg))
    stop()


if __name__ == "__main__":
    main()
