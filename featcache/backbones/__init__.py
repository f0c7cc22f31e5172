"""Backbones: what a name stands for, how a model is cut, what its layers give, and how they are pooled."""
