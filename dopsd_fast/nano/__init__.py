"""The embedded world: procedural pictures, a genuine tiny pipeline trained on them, and the means to measure it."""
