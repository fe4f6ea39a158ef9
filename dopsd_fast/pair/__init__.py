"""Student and teacher side by side through the same kernels, and the gradients of all states summed."""
