"""The compiled kernels and the Python code that calls them."""
