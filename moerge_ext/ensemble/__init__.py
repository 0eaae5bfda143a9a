"""PELMo: several prompts of one model as experts, a router over them, their next-token probabilities mixed."""
