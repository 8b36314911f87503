"""Networks, and the libraries that they come from."""
