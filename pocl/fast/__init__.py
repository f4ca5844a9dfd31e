"""What makes a step faster and smaller with the same results: kernels, attention, packing, heads, tied gradients."""
