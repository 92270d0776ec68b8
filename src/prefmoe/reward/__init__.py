"""DMoERM: one backbone, a sparse router over tasks, LoRA experts for capabilities, one reward."""
