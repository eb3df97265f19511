"""The compiled kernels and what calls them."""
