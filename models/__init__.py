"""Networks and the mathematics of diffusion; knows no run folder and no cluster.

The networks are `autoencoder`, `unet` and `clip` (of `layers` and `attention`), with diffusers' parameter names;
`denoiser` is the U-Net with what embeds its `conditions/`. `diffusion/` adds noise, weighs errors and samples,
`pipeline` makes images of prompts, `editing/` changes one by its words, `formats/` reads and writes weights.
"""
