"""The directive ``commands``: every command with its arguments and options, as the program itself has them."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import typer
from docutils import nodes
from docutils.parsers.rst import Directive


class Commands(Directive):
    """Writes a section for each command: how it is called, what its help says, and a list of what it takes."""

    def run(self) -> list[nodes.Node]:
        from dt_lens.cli.app import app

        group: Any = typer.main.get_command(app)
        root = group.make_context("dt-lens", [], resilient_parsing=True)
        return [self._section(group.commands[name], root) for name in group.list_commands(root)]

    def _section(self, command: Any, root: Any) -> nodes.section:
        context = command.make_context(command.name, [], parent=root, resilient_parsing=True)
        section = nodes.section(ids=[nodes.make_id(f"dt-lens {command.name}")])
        section += nodes.title(text=f"dt-lens {command.name}")
        usage = " ".join(["dt-lens", command.name, *command.collect_usage_pieces(context)])
        section += nodes.literal_block(usage, usage, language="sh")
        for part in inspect.cleandoc(command.help or "").replace("\f", "").split("\n\n"):
            if part.startswith("\b"):
                text = part.removeprefix("\b").strip("\n")
                section += nodes.literal_block(text, text, language="sh")
            else:
                section += nodes.paragraph(text=" ".join(part.split()))
        examples = "\n".join(getattr(sys.modules[command.callback.__module__], "EXAMPLES", ()))
        if examples:
            section += nodes.literal_block(examples, examples, language="sh")
        taken = nodes.definition_list(classes=["options"])
        for record in (parameter.get_help_record(context) for parameter in command.get_params(context)):
            if record is not None:  # a hidden option has none
                taken += self._taken(*record)
        section += taken
        return section

    def _taken(self, name: str, said: str) -> nodes.definition_list_item:
        item = nodes.definition_list_item()
        item += nodes.term("", "", nodes.literal(text=name))
        item += nodes.definition("", nodes.paragraph(text=" ".join(said.split())))
        return item


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
