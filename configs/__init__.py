"""One experiment per file; each has `config() -> TrainConfig`."""
