"""The VAE's norms and residual sums over images in channels-last layout, and PNG's bits."""
