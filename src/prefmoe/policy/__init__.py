"""PMoL: one policy that honours several preferences, by groups of LoRA experts and a router (arXiv 2411.01245)."""

from prefmoe.errors import ConfigError as _ConfigError

# PEFT comes first: importing it registers our tuner (prefmoe.import_hook), which imports the other files here.
try:
    import peft as _  # noqa: F401
except ModuleNotFoundError as _missing:
    raise _ConfigError("policies need PEFT and TRL; pip install 'prefmoe[policy]'") from _missing
