"""The models of `make demo`: a dense twin, and adaptive ones of its size."""
