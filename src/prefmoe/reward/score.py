"""Rewards of many texts: batched by length, order restored, with the reasons."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from prefmoe.backbone.packing import packed_batches
from prefmoe.data.render import Renderer
from prefmoe.errors import CheckpointError, DataError, join_problems
from prefmoe.nn import RoutingMode
from prefmoe.records import Completion, PreferencePair, RewardReport
from prefmoe.reward.model import DMoERMForSequenceClassification
from prefmoe.reward.texts import TextTable
from prefmoe.reward.trunk import Trunk
from prefmoe.reward.workbench import tokenizer_of
from prefmoe.runs.progress import Progress, silent


class Scores(NamedTuple):
    """What a model says of some texts, row for row, on the CPU."""

    rewards: Tensor  # (texts,)
    task_ids: Tensor  # (texts,)
    task_probs: Tensor  # (texts, tasks)
    capabilities: Tensor  # (texts, capabilities), NaN where the task was not used
    heads: Tensor  # (texts,) by the task's own adapter, before aggregation


@torch.inference_mode()
def score_texts(
    model: DMoERMForSequenceClassification,
    trunk: Trunk,
    texts: Sequence[int],
    *,
    routing: RoutingMode = "top1",
    task_ids: Sequence[int] | None = None,
    label: str = "scoring",
    progress: Progress = silent,
) -> Scores:
    """Scores texts of a trunk's table.

    Args:
        model: On the trunk's backbone.
        trunk: Gives the states below the experts.
        texts: Numbers of texts.
        routing: As in the model's `forward`.
        task_ids: Task of every text for `routing="given"`.
        label: For the progress bar.
        progress: Shows how far it is.
    """
    encoded = [trunk.table.texts[text] for text in texts]
    config = model.config
    scores = Scores(
        torch.empty(len(texts)),
        torch.empty(len(texts), dtype=torch.long),
        torch.empty(len(texts), len(config.tasks)),
        torch.empty(len(texts), len(model.capability_names)),
        torch.empty(len(texts)),
    )
    with progress(label, sum(len(text.input_ids) for text in encoded)) as advance:
        for batch in packed_batches(encoded, trunk.batch_tokens, hidden=trunk.hidden):
            inputs = trunk.batch([texts[i] for i in batch])
            given = None if task_ids is None else inputs.starts.new_tensor([task_ids[i] for i in batch])
            output = model.from_trunk(*inputs, task_ids=given, routing=routing, max_tokens=trunk.batch_tokens)
            scores.rewards[batch] = output.logits[:, 0].cpu()
            scores.task_ids[batch] = output.task_ids.cpu()
            scores.task_probs[batch] = output.task_probs.cpu()
            scores.capabilities[batch] = output.capability_scores.cpu()
            scores.heads[batch] = output.head_scores.cpu()
            advance(sum(len(encoded[i].input_ids) for i in batch))
    return scores


def given_tasks(
    model: DMoERMForSequenceClassification, rows: Sequence[Completion | PreferencePair]
) -> list[int]:
    """Numbers of the rows' own tasks; raises DataError that names those that the model does not know."""
    names = model.config.task_names
    unknown = sorted({str(row.task) for row in rows if row.task not in names})
    if unknown:
        raise DataError(f"tasks {unknown} are not among those of the model, {names}; use top1 routing")
    return [names.index(str(row.task)) for row in rows]


def report_of(
    model: DMoERMForSequenceClassification,
    scores: Scores,
    index: int,
    *,
    name: str,
    truncated_tokens: int = 0,
) -> RewardReport:
    """The record of one scored text, row `index` of `scores`."""
    names = model.config.task_names
    task = names[int(scores.task_ids[index])]
    columns = zip(model.capability_names, scores.capabilities[index].tolist(), strict=True)
    return RewardReport(
        id=name,
        reward=scores.rewards[index].item(),
        task=task,
        task_probs=dict(zip(names, scores.task_probs[index].tolist(), strict=True)),
        capabilities={capability: score for (owner, capability), score in columns if owner == task},
        truncated_tokens=truncated_tokens,
    )


class RewardModel:
    """A saved reward model with its tokenizer: texts in, reports out.

    Args:
        model: The network.
        renderer: The rendering that it was trained with.
        batch_tokens: Tokens of one forward pass; what texts share counts once.

    Example:
        reward_model = RewardModel.load("runs/reward/dmoerm")
        reports = reward_model.score([Completion("1", prompt, completion)])
    """

    def __init__(
        self, model: DMoERMForSequenceClassification, renderer: Renderer, *, batch_tokens: int = 8192
    ) -> None:
        if model.config.template_hash not in (None, renderer.template_hash):
            raise CheckpointError(
                f"the chat template or the tokenizer (hash {renderer.template_hash}) is not the one that the model was "
                f"trained with (hash {model.config.template_hash}); use the tokenizer saved beside the model"
            )
        self.model, self.renderer, self.batch_tokens = model, renderer, batch_tokens

    @classmethod
    def load(cls, folder: str | Path, *, batch_tokens: int = 8192) -> "RewardModel":
        """Loads a model and the tokenizer beside it, to the GPU if there is one, its experts in the backbone's dtype.

        Raises:
            CheckpointError: something is missing or does not fit together.
        """
        model = DMoERMForSequenceClassification.from_pretrained(folder)
        model.experts.store_in(model.backbone.dtype)
        if torch.cuda.is_available():
            model = model.cuda()
        try:
            tokenizer = tokenizer_of(Path(folder))
        except (OSError, ValueError) as problem:
            raise CheckpointError(
                f"{folder}: holds no tokenizer that can be read; copy it from the training run"
            ) from problem
        config = model.config
        renderer = Renderer(tokenizer, max_length=config.max_tokens, chat_template=config.chat_template)
        return cls(model, renderer, batch_tokens=batch_tokens)

    def score(
        self,
        completions: Sequence[Completion],
        *,
        routing: RoutingMode = "top1",
        progress: Progress = silent,
    ) -> list[RewardReport]:
        """A report for every completion, in order.

        Args:
            completions: What to score.
            routing: "top1", "soft", or "given" to use each completion's own task.
            progress: Shows how far it is.

        Raises:
            DataError: completions that cannot be rendered, or with "given" a task the model does not know.
        """
        if not completions:
            return []
        table = TextTable()
        encoded, problems = [], []
        for row in completions:
            try:
                encoded.append(self.renderer.encode(row.prompt, row.completion))
            except DataError as problem:
                problems.append(f"completion {row.id!r}: {problem}")
        if problems:
            raise DataError(join_problems(problems))
        texts = [table.add(text) for text in encoded]
        trunk = Trunk(
            self.model.backbone, self.model.config.split_layer, table, batch_tokens=self.batch_tokens
        )
        task_ids = given_tasks(self.model, completions) if routing == "given" else None
        scores = score_texts(self.model, trunk, texts, routing=routing, task_ids=task_ids, progress=progress)
        return [
            report_of(self.model, scores, index, name=row.id, truncated_tokens=text.truncated_tokens)
            for index, (row, text) in enumerate(zip(completions, encoded, strict=True))
        ]
