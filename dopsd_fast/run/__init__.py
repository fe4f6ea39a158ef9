"""One run: the loop, its folder, metrics, pictures and report."""
