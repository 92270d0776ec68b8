"""Every setting of PMoL that cannot work is refused with a sentence that says what to do."""

import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from prefmoe import PMoLConfig
from prefmoe.errors import CheckpointError, ConfigError, PrefmoeWarning, ShapeError
from prefmoe.nn import ExpertGroups
from tiny_policy import pmol_config, tiny_lm, tiny_policy, tokens

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft 0.21 asks transformers 5 for it
    "ignore:Could not find a config file in:UserWarning",  # base models here have no name on a hub
)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"groups": {"a": 0, "b": 1}}, r"group 'a' has 0 experts; every group needs 1 or more"),
        ({"groups": {"a": 1.5}}, r"group 'a' has 1.5 experts"),
        ({"groups": ["a", "b"]}, r"groups=\['a', 'b'\] says not how many experts each has; give the number"),
        ({"groups": {}}, r"no groups; give the number of experts by preference, such as \{'helpful': 2"),
        (
            {"groups": {"a": 1, "empty": 1}},
            r"'empty' is the name of the empty expert; call the group something else",
        ),
        ({"top_k": 4}, r"top_k=4, but there are 3 experts; choose 1 to 3"),
        ({"top_k": 0}, r"top_k=0, but there are 3 experts; choose 1 to 3"),
        (
            {"router_scope": "blok"},
            r"router_scope='blok' is not one of linear, block, model; did you mean 'block'\?",
        ),
        ({"group_loss": "softt"}, r"group_loss='softt' is not one of soft, .*did you mean 'soft'"),
        (
            {"router": "recurrent", "router_scope": "linear"},
            r"hands its state from block to block; .* choose 'block'",
        ),
        ({"rank": 0}, r"rank=0; expected 1 to inf"),
        ({"group_smoothing": 1.5}, r"group_smoothing=1.5; expected 0 to 1"),
        ({"temperature": 0.0}, r"temperature=0.0; expected a number above 0"),
        ({"empty_mass": 1.0}, r"empty_mass=1.0; expected a fraction above 0 and below 1"),
        ({"empty_mass": 0.5, "empty_expert": False}, r"need empty_expert=True"),
    ],
)
def test_a_setting_that_cannot_work(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        pmol_config(**changes)


def test_all_that_is_wrong_comes_in_one_list():
    with pytest.raises(ConfigError, match=r"(?s)top_k=9.*router_scope='x'.*rank=-1"):
        pmol_config(top_k=9, router_scope="x", rank=-1)


def test_one_group_only_switches_the_group_loss_off_and_says_so():
    with pytest.warns(PrefmoeWarning, match=r"PMoL has one group, 'a', .* switched off"):
        config = PMoLConfig(groups={"a": 2})
    assert config.group_loss == "none"


@pytest.mark.parametrize(
    ("target_modules", "sentence"),
    [
        (
            ["q_prj"],
            r"target_modules=\['q_prj'\] matches no module of LlamaForCausalLM; nearest: 'q_proj' \(3 mod",
        ),
        (["zzzzz"], r"matches no module of LlamaForCausalLM; linear layers: .*'down_proj' \(3 modules\)"),
        (
            ["embed_tokens"],
            r"target module 'model.embed_tokens' is a Embedding; PMoL's experts sit in linear layers",
        ),
        (["input_layernorm"], r"is a LlamaRMSNorm; PMoL's experts sit in linear layers; exclude it"),
    ],
)
def test_target_modules_that_cannot_carry_experts(target_modules, sentence):
    with pytest.raises(ConfigError, match=sentence):
        get_peft_model(tiny_lm(), pmol_config(target_modules=target_modules))


def test_a_base_model_of_another_size(tmp_path):
    tiny_policy().save_pretrained(tmp_path)
    config = tiny_lm().config
    config.hidden_size, config.intermediate_size = 32, 64
    wide = type(tiny_lm())(config)
    with pytest.raises(
        CheckpointError, match=r"do not fit this model.*load it on the model it was trained on"
    ):
        PeftModel.from_pretrained(wide, tmp_path)


def test_layers_that_see_other_tokens_than_their_router():
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.second(self.first(x)[:1])

    config = pmol_config(
        task_type=None, target_modules=["first", "second"], router_scope="model", group_loss="none"
    )
    model = get_peft_model(Split(), config)
    with pytest.raises(
        ShapeError, match=r"sees tokens of shape \(1,\), its router saw \(3,\); use router_scope='lin"
    ):
        model(torch.zeros(3, 4))


@pytest.mark.parametrize(
    ("preferences", "sentence"),
    [
        (
            torch.tensor([0, 1, 0]),
            r"got \(3,\) for 4 texts and 2 groups; give one number, or one share a group",
        ),
        (torch.rand(4, 3), r"got \(4, 3\) for 4 texts and 2 groups"),
    ],
)
def test_preferences_that_do_not_fit_the_batch(preferences, sentence):
    with pytest.raises(ShapeError, match=sentence):
        tiny_policy()(input_ids=tokens(), preferences=preferences)


def test_group_numbers_that_do_not_exist():
    with pytest.raises(ShapeError, match=r"there is no group 2; expected 0 to 1 \(a, b\), or -1 for none"):
        tiny_policy()(input_ids=tokens(), preferences=torch.tensor([0, 1, 2, 1]))


@pytest.mark.parametrize(
    ("names", "sizes", "sentence"),
    [
        ((), (), r"expected a number of experts for each name"),
        (("a",), (1, 2), r"expected a number of experts for each name"),
        (("a",), (0,), r"'a' has 0 experts; every group needs 1 or more"),
    ],
)
def test_groups_that_cannot_be(names, sizes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ExpertGroups(names, sizes)


LOAD = "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER); print('loaded')"
PEFT = "from peft import PeftModel; from transformers import AutoModelForCausalLM"


@pytest.mark.parametrize(
    ("imports", "loads"),
    [
        (PEFT, False),
        (f"import prefmoe; {PEFT}", True),
        (f"{PEFT}; import prefmoe", True),
        # TRL asks so, before it imports it.
        (f"import prefmoe; from importlib.util import find_spec; find_spec('peft'); {PEFT}", True),
    ],
    ids=["never", "before peft", "after peft", "before somebody looks whether there is a peft"],
)
def test_an_adapter_loads_where_prefmoe_is_imported_before_or_after_peft(imports, loads, tmp_path):
    tiny_lm().save_pretrained(tmp_path / "base")
    tiny_policy().save_pretrained(tmp_path / "adapter")
    program = f"BASE, FOLDER = {str(tmp_path / 'base')!r}, {str(tmp_path / 'adapter')!r}; {imports}; {LOAD}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False
    )
    assert ("loaded" in done.stdout) == loads, done.stderr
    if not loads:
        assert "PMOL" in done.stderr
