"""What differs between models: Z-Image, FLUX.2-klein."""
