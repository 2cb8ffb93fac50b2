"""A finished run as other programs load it: diffusers' folders, CompVis files, other averages of the weights."""
