"""What runs: a room for each command, the entry scripts beside them.

Imports go down: board, sweeps, stages, planning, exporting > editing > evaluation > sampling, training > latents >
engine. `engine` trains any of the networks; what they are is in `training`.
"""
