"""Image generation: LoRA on Stable Diffusion 1.x, 2.x, XL, 3 and Flux, through diffusers' models."""
