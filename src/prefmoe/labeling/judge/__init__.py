"""Capability labels from a language model: asked in both orders, stored, kept where the two answers agree."""
