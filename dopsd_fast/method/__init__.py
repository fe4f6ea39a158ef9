"""The objective on a trajectory: D-OPSD, and what the paper compares it with."""
