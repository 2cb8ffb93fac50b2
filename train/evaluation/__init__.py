"""Metrics that can be trusted: `train/evaluate.py`, the small evaluation in a training, and what both stand on.

    target -> images -> features    in chunks, so that a killed evaluation goes on    targets, feature_cache
    features -> metrics             against a reference with its protocol             metrics, frechet, reference

`judges/` are probes trained on real images that say whether a prompt was followed.
"""
