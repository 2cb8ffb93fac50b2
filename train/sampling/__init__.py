"""`train/sample.py`: prompts to image files.

    folder -> model                       autoencoder and CLIP are those of the U-Net's training   load
    options -> prompts -> requests        with what the network reads beside a prompt              requests, user_images
    requests -> batches -> images         what is there already is left out                        run
    images -> PNGs, grid.png, film.png    each says what makes it again                            sample_folder

Evaluation, editing and the playground take the model and the folder from here.
"""
