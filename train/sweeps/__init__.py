"""Results of a sweep of `train/evaluate.py`, compared.

`results` reads each one from its folder and leaves out what cannot be compared, `pareto` writes tables and a W&B run,
`plots` draws.
"""
