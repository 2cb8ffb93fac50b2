"""A finished run as other programs load it: `train/export.py` writes a folder of diffusers, `train/average.py` weights.

`export` joins the exports of autoencoder, CLIP and U-Net; `average` makes another average of the U-Net's weights, of
the copies that its training kept.
"""
