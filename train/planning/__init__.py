"""`train/plan.py`: what a training of the U-Net will need, from its configuration alone.

`activations` counts what a step keeps, `memory` adds what each way of sharding holds, `estimate` makes time, disk and
GPU-hours of it, `cost_report` the tables.
"""
