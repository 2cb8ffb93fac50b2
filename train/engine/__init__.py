"""One training loop for all networks: steps, checkpoints, averages, logs, on any number of processes.

A stage (`state.Stage`) says what a micro-batch teaches; `trainer.fit` finds where its run begins, and `trainer.train`,
the loop in one piece, fetches, steps, logs, checkpoints, evaluates and stops on a signal. A network in training is a
`trainable.Trainable`, distributed by one of `backend/`; `checkpoint` keeps what a run needs to continue, `metric_log`
what it measured, and `marker` tells a whole folder from a damaged one.
"""
