"""From sources of images and captions to shards: what `data/build_shards.py` does.

A source (`sources/`) says where each sample is, in an order that never varies; any process decodes, filters and encodes
it (`records`, `filters`); its caption alone says whether it is held out (`split`); shards and manifest are
whole or not there, and a build that was killed goes on (`build`, `journal`).
"""
