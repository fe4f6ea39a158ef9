"""The frozen encoders (text, vision-language, VAE) and the cache of what they produce."""
