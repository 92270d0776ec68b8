"""`import prefmoe` costs nothing, and yet transformers knows our model, whoever is imported first."""

import subprocess
import sys

import pytest

import prefmoe
from tiny import tiny_reward_model

LOAD = "print(type(AutoModelForSequenceClassification.from_pretrained(FOLDER)).__name__)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_reward_model().save_pretrained(folder, include_backbone=True)
    return folder


def output_of(program, folder=None):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"FOLDER = {str(folder)!r}\n{program}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_prefmoe_imports_no_torch_and_no_transformers():
    program = (
        "import prefmoe, sys\nprint([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    assert output_of(program) == "[]"


@pytest.mark.parametrize(
    "program",
    [
        "import prefmoe\nfrom transformers import AutoConfig, AutoModelForSequenceClassification\n"
        f"assert AutoConfig.from_pretrained(FOLDER).model_type == 'dmoerm'\n{LOAD}",
        f"from transformers import AutoModelForSequenceClassification\nimport prefmoe\n{LOAD}",
    ],
    ids=["prefmoe first", "transformers first"],
)
def test_auto_classes_load_our_model_in_any_order_of_imports(folder, program):
    assert output_of(program, folder) == "DMoERMForSequenceClassification"


@pytest.mark.parametrize(
    "first",
    [
        "import importlib.util, prefmoe; importlib.util.find_spec('peft')",
        "from prefmoe.reward.score import RewardModel",
    ],
    ids=["asked for before", "behind a reward model"],
)
def test_peft_knows_our_adapters_even_if_somebody_asked_whether_it_is_there(first):
    program = f"{first}\nfrom peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as known\n"
    assert output_of(program + "print([key.value for key in known if key.value == 'PMOL'])") == "['PMOL']"


def test_every_public_name_can_be_had_and_is_listed():
    for name in prefmoe.__all__:
        assert getattr(prefmoe, name).__name__ == name
    assert set(prefmoe.__all__) <= set(dir(prefmoe))


def test_an_unknown_name():
    with pytest.raises(AttributeError, match=r"module 'prefmoe' has no attribute 'RewardModul'"):
        prefmoe.RewardModul  # noqa: B018
