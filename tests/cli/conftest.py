"""A tiny backbone in a folder and a saved model on it; neither is ever written to."""

from pathlib import Path

import pytest

from cli_helpers import MAX_LENGTH
from data_helpers import CHATML, byte_tokenizer
from prefmoe.data.render import Renderer
from tiny import tiny_backbone, tiny_reward_model


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    tiny_backbone().save_pretrained(folder)
    byte_tokenizer(CHATML).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def saved_model(backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model with random experts, saved as training saves it; nothing was trained."""
    folder = tmp_path_factory.mktemp("saved") / "dmoerm"
    tokenizer = byte_tokenizer(CHATML)
    renderer = Renderer(tokenizer, max_length=MAX_LENGTH)
    model = tiny_reward_model(
        tiny_backbone(),
        max_tokens=MAX_LENGTH,
        chat_template=renderer.chat_template,
        template_hash=renderer.template_hash,
        response_marker=list(renderer.response_marker),
    )
    model.config.backbone = str(backbone_folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
