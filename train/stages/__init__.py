"""`train/pipeline.py`: all stages, each a process of its own, those that are finished left out.

`tasks` makes a list of checked tasks of the command line, `run` goes through it and keeps what each was made from,
`child` starts and stops a process, `display` says how far it is, `time_left` how long it takes: first as `calibration`
found it in a process of its own, then as it really was. `live_page`, `terminal_image` and `next_steps` are what there
is to look at and to try. Nothing here imports torch: a stage does, in its own process.
"""
