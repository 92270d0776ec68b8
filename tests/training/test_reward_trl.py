"""The reward model as `reward_funcs` of TRL's trainers: the same rewards as ours, and a policy step runs."""

import math

import pytest
from datasets import Dataset
from transformers import LlamaForCausalLM
from trl import RLOOConfig, RLOOTrainer

from data_helpers import CHATML, byte_tokenizer
from prefmoe.data.render import Renderer
from prefmoe.records import Completion, Message
from prefmoe.reward.score import RewardModel
from tiny import tiny_backbone, tiny_reward_model

PROMPTS = [[{"role": "user", "content": text}] for text in ("Hi?", "What now?", "Why?", "A longer question?")]
COMPLETIONS = [[{"role": "assistant", "content": text}] for text in ("Hm.", "Nothing at all.", "So.", "Yes")]

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"
)


def tokenizer():
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.pad_token = "</s>"  # pad = end of text, which must not matter
    return tokenizer


@pytest.fixture
def folder(tmp_path):
    renderer = Renderer(tokenizer(), max_length=120)
    model = tiny_reward_model(
        response_marker=list(renderer.response_marker), template_hash=renderer.template_hash
    )
    model.config.max_tokens, model.config.chat_template = 120, CHATML
    model.save_pretrained(tmp_path / "reward", include_backbone=True)
    tokenizer().save_pretrained(tmp_path / "reward")
    return tmp_path / "reward"


@pytest.fixture(params=["object", "name"])
def trainer(folder, request, tmp_path):
    reward_model = RewardModel.load(folder).model if request.param == "object" else str(folder)
    arguments = RLOOConfig(
        output_dir=str(tmp_path / "policy"),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=4,
        max_steps=1,
        beta=0.0,  # no reference model
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    return RLOOTrainer(
        model=LlamaForCausalLM(tiny_backbone().config),
        reward_funcs=reward_model,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tokenizer(),
    )


def messages(turns):
    return tuple(Message(**turn) for turn in turns)


def test_trl_gets_the_rewards_that_our_own_scoring_gives_and_trains_on_them(folder, trainer):
    rows = [
        Completion(str(i), messages(prompt), messages(completion))
        for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True))
    ]
    ours = [report.reward for report in RewardModel.load(folder).score(rows)]
    inputs = [{"prompt": prompt} for prompt in PROMPTS]
    theirs = trainer._calculate_rewards(inputs, PROMPTS, COMPLETIONS, [[1]] * 4)[:, 0].tolist()
    assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-5)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert math.isfinite(logged["rewards/reward/mean"])
