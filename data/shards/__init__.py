"""Shards on disk: tars that are written whole, described by a manifest, and read by memory map or from afar.

`shard` writes and reads one tar, `tar_index` finds the members, `manifest` describes a folder of them, `store` gives
records by number, `remote` opens addresses and `cache` keeps what came from there on a local disk.
"""
