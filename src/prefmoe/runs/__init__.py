"""What every training run has: settings from a YAML file, a folder of steps, progress for people."""
