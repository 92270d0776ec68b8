"""Slow twin of prefmoe.nn.merging: one weight at a time (Huang et al. 2024, arXiv 2405.17461, section 3)."""


def elect_mask_rescale(tasks):
    """What each task adds in the end; `tasks` holds, for each task, its deltas of all weights of the model in a row."""
    unified = []
    for values in zip(*tasks, strict=True):
        total = sum(values)
        agreeing = [abs(value) for value in values if value * total > 0]
        unified.append(max(agreeing, default=0.0) * (1 if total > 0 else -1))
    merged = []
    for values in tasks:
        masked = [u if value * u > 0 else 0.0 for value, u in zip(values, unified, strict=True)]
        kept = sum(abs(value) for value in masked)
        factor = sum(abs(value) for value in values) / kept if kept else 0.0
        merged.append([factor * value for value in masked])
    return merged
