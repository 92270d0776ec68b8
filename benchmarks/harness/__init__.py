"""What several benchmarks share: timing, the machine's name, loads, models, memory."""
