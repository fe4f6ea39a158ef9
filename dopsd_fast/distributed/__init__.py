"""Ranks: one process, or DeepSpeed's ZeRO; that all of them run the same, and that none is lost silently."""
