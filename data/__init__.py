"""Data: shards in, batches out, in an order that is a function of the seed alone; knows no network.

The route of a training sample:

    position in the stream   samples_seen and the batch say which positions come next      loader
    -> sample of the set     a permutation that (seed, epoch) decides, never stored         order
    -> shard and record      from the manifest's counts                                     shards/manifest
    -> bytes                 of a memory-mapped tar, local or cached from afar              shards/store
    -> tensors               cut and mirrored by what (seed, position) draws                {image,latent}_dataset

On disk: `shards/{train,heldout}/*.tar` of images and captions with a `manifest.json` beside them (`building/` makes
them of folders, tables and shards of others), `latents/{train,heldout}/*.tar` of what `train/latents/` encodes
(`latent_record` is the format of one record).
"""
