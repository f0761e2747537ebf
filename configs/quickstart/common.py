"""What makes the quickstart models twins: their size, text and training."""

from adaptivejax.models import DecoderConfig
from adaptivejax.training import DataConfig, OptimizerConfig

MODEL = DecoderConfig(layers=8, features=128, hidden=512, heads=4, kv_heads=4)
DATA = DataConfig(context=128, batch=16)
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, warmup=30)
STEPS = 260
