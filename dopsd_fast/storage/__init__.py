"""What goes to the disk and comes back: checkpoints, exports, atomic writes, digests."""
