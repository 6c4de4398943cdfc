"""Serve Baidu's ERNIE-4.5-VL models from one Ray cluster: vision, prefill and decode pools behind one router."""

__version__ = "0.1.0"

__all__ = ["__version__"]
