"""`train/edit.py` and `train/evaluate_edits.py`: images before and after an edit, and whether the edit obeyed.

`edits_file` reads what is to be edited, `run` edits it in batches (the mathematics is `models.editing`) into a
`train.sampling.sample_folder`, `sheet` shows what the words look at. `evaluate` edits captions of the demo set, of
which `demo_edits` knows what must change, and asks a judge.
"""
