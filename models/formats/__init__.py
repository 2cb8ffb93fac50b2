"""Weights and configurations as others read them: diffusers' folders, safetensors, CompVis files, LoRA.

`weights` reads and writes a folder and names what does not fit, `tensor_stream` writes what no process holds whole;
`unet`, `autoencoder`, `clip` translate `config.json`, `compvis` and `single_file` whole checkpoints, `lora` adapters.
"""
