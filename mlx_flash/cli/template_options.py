"""What the chat template is given: options of `generate` and `chat`."""

import json
from dataclasses import dataclass
from typing import Any

import click

from .gathered import gathered


class JsonObject(click.ParamType):
    """A JSON object, as `{"enable_thinking": false}`."""

    name = "JSON"

    def convert(self, value, param, ctx):
        try:
            found = json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            self.fail(f"""{value!r} is no JSON object. Try '{{"name": true}}'.""")
        return found


@dataclass(frozen=True)
class TemplateOptions:
    """The options by mlx-lm's names."""

    system_prompt: str | None
    chat_template_config: dict[str, Any] | None


template_options = gathered(
    "template",
    TemplateOptions,
    [
        click.option(
            "--system-prompt",
            metavar="TEXT",
            help="What the model is told before everything else.",
        ),
        click.option(
            "--chat-template-config",
            type=JsonObject(),
            metavar="JSON",
            help="""For the chat template, such as '{"enable_thinking": false}'.""",
        ),
    ],
)
