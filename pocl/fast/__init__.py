"""What makes a step fast and small, its numbers unchanged: kernels, attention, packing, heads, tied gradients."""
