"""`train/sample.py`: prompts to image files.

`requests` says what is to be drawn, `load` reads the model, `run` draws in batches what is not there yet, and
`sample_folder` writes it.
"""
