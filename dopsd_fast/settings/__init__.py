"""Every setting of a run: what there is, where values come from, and what must hold between them."""
