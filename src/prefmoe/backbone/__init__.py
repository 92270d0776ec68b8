"""Backbones of transformers, whose layers run on texts that share their beginnings."""
