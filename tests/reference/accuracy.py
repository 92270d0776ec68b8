"""Accuracy and its bootstrap in plain floats and loops."""

import math


def hit(margin):
    if margin > 0:
        return 1.0
    return 0.5 if margin == 0 else 0.0


def mean(values):
    return math.fsum(values) / len(values)


def percentile(values, share):
    """Linear between the two neighbours, as most packages do it."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def bootstrap(tasks, draws, level, summarize=mean):
    """Ends of the interval of the macro mean, or of what else sums up the tasks.

    tasks: {task: [(prompt, value), ...]}; draws: {task: [[number of a prompt, ...] for each resample]}.
    """
    num_resamples = len(next(iter(draws.values())))
    resampled = []
    for resample in range(num_resamples):
        task_means = []
        for task, rows in tasks.items():
            prompts = sorted({prompt for prompt, _ in rows})
            drawn = [prompts[number] for number in draws[task][resample]]
            values = [value for wanted in drawn for prompt, value in rows if prompt == wanted]
            task_means.append(mean(values))
        resampled.append(summarize(task_means))
    return percentile(resampled, (1 - level) / 2), percentile(resampled, (1 + level) / 2)


def standard_error(rows):
    """Of the mean of rows [(prompt, value), ...], whose prompts were drawn one by one."""
    center = mean([value for _, value in rows])
    prompts = sorted({prompt for prompt, _ in rows})
    if len(prompts) < 2:
        return math.inf
    sums = [math.fsum(value - center for prompt, value in rows if prompt == wanted) for wanted in prompts]
    spread = math.fsum(total**2 for total in sums) * len(prompts) / (len(prompts) - 1)
    return math.sqrt(spread) / len(rows)
