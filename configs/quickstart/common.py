"""What makes the quickstart models twins: their size, text and training."""

from adaptivejax.models import DecoderConfig
from adaptivejax.training import DataConfig, OptimizerConfig

MODEL = DecoderConfig(layers=12, features=64, hidden=256, heads=4, kv_heads=4)
DATA = DataConfig(context=128, batch=16)
OPTIMIZER = OptimizerConfig(learning_rate=4e-3, warmup=30)
STEPS = 220
EXITS = (5, 7, 9, 12)
