"""One training loop for all networks: steps, checkpoints, averages, logs, on any number of processes.

A stage (`state.Stage`) says what a micro-batch teaches; the loop (`loop.run`) fetches, steps, logs, checkpoints,
evaluates and stops on a signal. A network in training is a `trainable.Trainable`, distributed by one of `backend/`.
"""
