"""PMoL: one policy that honours several preferences, by groups of LoRA experts and a router (arXiv 2411.01245)."""
