"""A group of commands one of which may go without its name: `prefmoe label IN` is `prefmoe label pairs IN`."""

from typing import Any, ClassVar

from typer.core import TyperGroup


class DefaultsToPairs(TyperGroup):
    """Takes whatever is no command for the first argument of the default command."""

    default_command: ClassVar[str] = "pairs"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Puts the default command's name in front where no command is named."""
        if args and args[0] not in self.commands and args[0] != "--help":
            args = [self.default_command, *args]
        return super().parse_args(ctx, args)
