"""`train/edit.py` and `train/evaluate_edits.py`: images before and after an edit, and whether the edit obeyed."""
