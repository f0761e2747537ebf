"""What the quickstart models share: size, text and training, so they are twins."""

from adaptivejax.models import DecoderConfig
from adaptivejax.training import DataConfig, OptimizerConfig

MODEL = DecoderConfig(layers=8, features=192, hidden=768, heads=6, kv_heads=6)
DATA = DataConfig(context=128, batch=16)
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, warmup=30)
STEPS = 300
