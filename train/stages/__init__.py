"""`train/pipeline.py`: all stages, each a process of its own, those that are finished left out.

`tasks` makes a list of checked tasks of the command line, `run` goes through it and keeps what each was made from,
`child` starts and stops a process, `display` says how far it is. Nothing here imports torch: a stage does, in its own.
"""
