"""The three trainings of the latent diffusion paper: what each is, for the loop of `train/engine/`."""
