"""Scores of routing methods on tasks, and what their routers did."""
