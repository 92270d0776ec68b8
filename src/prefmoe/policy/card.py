"""The first lines of an adapter's model card: what to do so that PEFT can load it."""

import re
from pathlib import Path

from prefmoe.evaluation.files import write_text

HOW_TO_LOAD = """\
> **This is a PMoL adapter: PEFT loads it once `prefmoe` has been imported** (`pip install 'prefmoe[policy]'`). Without
> that import it stops with `KeyError: 'PMOL'`.
>
> ```python
> import prefmoe  # registers the PEFT type
> from peft import AutoPeftModelForCausalLM
>
> model = AutoPeftModelForCausalLM.from_pretrained("path/of/this/folder")
> ```
"""
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def say_how_to_load(folder: Path) -> None:
    """Puts the lines behind the card's front matter, once; makes a card where there is none."""
    file = folder / "README.md"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    if HOW_TO_LOAD in text:
        return
    matter = _FRONT_MATTER.match(text)
    border = matter.end() if matter else 0
    write_text(file, f"{text[:border]}\n{HOW_TO_LOAD}\n{text[border:]}".lstrip("\n"))
