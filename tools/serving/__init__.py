"""The two engines of `make serve`."""
