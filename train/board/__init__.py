"""What people look at: the page of a run, the preview of its data, the W&B workspace, the playground.

`run_folder` reads a run as it stands, finished or not; `panels` lists what is shown, for page and workspace alike;
`report` makes the page, `live` serves it while the run goes on.
"""
