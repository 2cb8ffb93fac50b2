"""`train/pipeline.py`: all stages, each a process of its own, those that are finished left out."""
