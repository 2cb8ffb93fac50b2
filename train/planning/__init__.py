"""`train/plan.py`: what a training will need, from its configuration alone."""
