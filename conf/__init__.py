"""Options: what a user may choose, and how a command line becomes one checked object.

`entry` composes with Hydra: `conf/COMMAND.yaml` starts from its dataclass in `schema/` (every option with type, default
and check), takes an experiment (`experiments`, one file each in `experiment/`) and files of the groups `model/`,
`runtime/`, `protocol/`, `conditions/`; the command line has the last word. Below the entry script there are only
dataclasses. `help` shows what stands in `schema/`, `ending` is how a command ends, `sweep` and `slurm_launcher` are
what `-m` does. What all floors need of the system is here, too: `files` (whole or not there, digests), `process`
(torchrun, signals, locks), `plain_json`.
"""
