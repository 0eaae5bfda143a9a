"""`moerge train-router`."""

from .ensemble import add_train_arguments as add_arguments
from .ensemble import run_train as run

__all__ = ["add_arguments", "run"]
