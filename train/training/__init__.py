"""The trainings of the latent diffusion paper, and distillation: what each is, for the loop of `train/engine/`."""
