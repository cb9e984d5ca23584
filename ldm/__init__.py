"""Train text-to-image latent diffusion models from scratch."""
