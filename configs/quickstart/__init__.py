"""The models of `make demo`: a dense twin and three adaptive ones of its size."""
