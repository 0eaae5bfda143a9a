"""Training: experts (LoRA), their gates, and gates that need no training."""
