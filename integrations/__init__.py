"""Adapters that plug `LearnedOptimizer` into training frameworks. They use the public API only."""
