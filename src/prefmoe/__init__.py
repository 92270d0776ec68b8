"""prefmoe: align language models to competing preferences with mixtures of LoRA experts."""
