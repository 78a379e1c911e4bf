"""The group ``axolotl spft``: finds its commands in the files beside this one.

The file ``<name>.py`` of a command holds a `click.Command` called ``command``. It imports torch and the like inside the
functions that need them, so that ``--help`` answers at once.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

import click

from axolotl_spft import tools

_NO_COMMANDS = ("cli", "options")


class Mistake(click.ClickException):
    """A command that was called wrongly or given a wrong file: one line, and click's exit status for that."""

    exit_code = 2


class CommandFiles(click.Group):
    """A group whose commands are the files of a package; a file is imported when its command is looked up."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(module.name for module in pkgutil.iter_modules(tools.__path__) if module.name not in _NO_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        return import_module(f"{tools.__name__}.{cmd_name}").command

    def invoke(self, ctx: click.Context):
        from axolotl_spft.errors import SpftError

        try:
            return super().invoke(ctx)
        except SpftError as error:
            # a mistake of the user's, not of the program's: the sentence without the traceback
            raise Mistake(str(error)) from error
        except click.UsageError as error:
            # without click's lines about the usage around the sentence
            command = (error.ctx or ctx).command_path
            raise Mistake(f"{error.format_message().rstrip('.')} (`{command} --help` tells the options)") from error


@click.group(cls=CommandFiles)
def spft() -> None:
    """Salience-aware sparse fine-tuning."""
