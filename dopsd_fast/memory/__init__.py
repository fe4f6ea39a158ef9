"""Will it fit: bytes counted and traced before anything is loaded."""
