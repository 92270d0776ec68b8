"""Text in, checked records and token ids out."""
