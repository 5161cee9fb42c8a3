"""Turns a diffusion UNet into a bundle that `diffloss_trt` can run; the command line is `diffloss-export`."""
