"""What a chat reads and shows: at a terminal with colours and editing, else plain.

Answers go to stdout, all the rest to stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..errors import FlashError
from ..progress import Bar
from ..storage.files import cache_folder

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History

HISTORY = "chat_history"
MORE = "\\"  # at the end of a line: the message goes on in the next one


def shown(text: str) -> str:
    """`text` without what a terminal would take for a command."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


class Screen:
    """Where answers and notes go."""

    def __init__(self) -> None:
        self.live = sys.stdin.isatty() and sys.stdout.isatty()

    def piece(self, text: str, thinking: bool = False) -> None:
        """A piece of an answer; thoughts are dimmed."""
        if self.live:
            text = click.style(shown(text), dim=True) if thinking else shown(text)
        click.echo(text, nl=False)

    def end(self) -> None:
        click.echo()

    def gap(self) -> None:
        """An empty line between turns, where a person looks."""
        if self.live:
            click.echo(err=True)

    def note(self, text: str) -> None:
        """A quiet line."""
        click.echo(click.style(text, dim=True), err=True)

    def text(self, text: str) -> None:
        click.echo(text, err=True)

    def error(self, text: str) -> None:
        click.echo(click.style(f"Error: {text}", fg="red"), err=True)

    def waiting(self) -> Bar:
        """How far the reading of a prompt is, at a terminal."""
        return Bar("reading", shown=None if self.live else False, unit="token")


def read_messages(screen: Screen, commands: Sequence[str]) -> Iterator[str]:
    """What the user says, message by message, until the input ends."""
    if screen.live:
        yield from _typed(screen, commands)
        return
    lines: list[str] = []
    for line in _piped():
        lines.append(line.rstrip("\r\n"))
        if lines[-1].endswith(MORE):
            lines[-1] = lines[-1].removesuffix(MORE)
            continue
        yield "\n".join(lines)
        lines.clear()
    if lines:
        yield "\n".join(lines)


def _piped() -> Iterator[str]:
    for line in sys.stdin.buffer:
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise FlashError(
                "The input is not text in UTF-8. Convert it first, with iconv for "
                "example."
            ) from error


def _typed(screen: Screen, commands: Sequence[str]) -> Iterator[str]:
    session = _session(commands)
    while True:
        try:
            yield session.prompt("› ")
        except KeyboardInterrupt:
            screen.note("Ctrl-D or /quit ends the chat.")
        except EOFError:
            return


def _session(commands: Sequence[str]) -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def enter(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith(MORE):
            buffer.delete_before_cursor(len(MORE))
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def alt_enter(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(
        history=_history(),
        completer=WordCompleter(list(commands), sentence=True),
        complete_while_typing=False,
        key_bindings=keys,
        multiline=True,
        prompt_continuation="  ",
    )


def _history() -> History:
    """Of this user alone: what people ask is private."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    file = cache_folder() / HISTORY
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(file))
