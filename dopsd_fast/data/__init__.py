"""From files to the batches of an epoch: records, pictures, sizes, order, noise."""
