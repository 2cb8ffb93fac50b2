"""`data/precompute_latents.py`: image shards to latents, once, by any number of processes.

`precompute` shares the shards out and joins what was made, `shard` encodes one, `encoder` holds the networks, `check`
decodes a sample of it back, `provenance` is what a training holds against its own options.
"""
