"""A chat at work: messages become answers, and lines with a slash commands."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ..errors import FlashError, NotEnoughMemory
from ..memory_size import say_memory

if TYPE_CHECKING:
    from ..conversation import Conversation
    from ..flash import Flash
    from .terminal import Screen

HELP = {
    "/help": "This list.",
    "/reset": "Begin a new conversation; the system prompt stays.",
    "/system TEXT": "Tell the model who it is; without a text, show what it was told.",
    "/save FILE": "Write the conversation as JSON.",
    "/load FILE": "Go on with a saved conversation.",
    "/stats": "What the last answer cost.",
    "/memory SIZE": "Hold so much from now on: 6GB, or 50% of the model.",
    "/quit": "End the chat, as Ctrl-D does.",
}
KEYS = "Ctrl-C ends an answer. \\ or Alt-Enter makes a new line."
ANEW = "/reset begins anew."
OTHERS = {"/exit": "/quit", "/bye": "/quit", "/clear": "/reset", "/?": "/help"}


class Chat:
    """A conversation at a terminal or in a pipe.

    Attributes:
        failed: Whether a turn or a command ended in an error.
    """

    def __init__(self, talk: Conversation, flash: Flash, screen: Screen, quiet: bool):
        self.failed = False
        self._talk = talk
        self._flash = flash
        self._screen = screen
        self._quiet = quiet
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/reset": self._reset,
            "/system": self._system,
            "/save": self._save,
            "/load": self._load,
            "/stats": self._stats,
            "/memory": self._memory,
        }

    def run(self, lines: Iterable[str]) -> None:
        """Answer every line, until they end or one says /quit."""
        for line in lines:
            word, _, rest = line.strip().partition(" ")
            word = OTHERS.get(word, word)
            if word == "/quit":
                return
            try:
                if word in self._commands:
                    self._commands[word](rest.strip())
                elif re.fullmatch(r"/[a-z?]+", word):
                    raise FlashError(f"There is no {word}. /help lists what there is.")
                elif word:
                    self._answer(line)
            except KeyboardInterrupt:
                self._screen.end()
                self._screen.note(self._broken_off())
            except FlashError as error:
                self.failed = True
                self._screen.error(str(error))

    def _answer(self, text: str) -> None:
        """One turn. It ends a line of stdout in every case, and says what it was."""
        talk, screen = self._talk, self._screen
        with screen.waiting() as waiting:
            talk.progress = waiting.reach
            begun = False
            try:
                for piece in talk.ask(text):
                    waiting.close()
                    begun = True
                    screen.piece(piece.text, piece.thinking)
            except FlashError as error:
                waiting.close()
                if begun:
                    screen.end()
                what = "is kept" if talk.kept else "was not taken into the conversation"
                raise FlashError(f"{error} The turn {what}. {ANEW}") from error
        screen.end()
        if not begun:
            screen.note("The answer is empty: its first token ends it.")
        elif talk.finish_reason == "length":
            screen.note(self._cut_off())
        if not self._quiet:
            screen.note(self._figures())
            screen.gap()

    def _cut_off(self) -> str:
        positions = self._flash.positions
        if positions is not None and len(self._talk.tokens) >= positions - 1:
            return f"Cut off: the model has {positions:,} positions. {ANEW}"
        assert self._flash.run is not None
        return f"Cut off after {len(self._flash.run.tokens):,} tokens (--max-tokens)."

    def _broken_off(self) -> str:
        if self._talk.kept:
            return "Stopped. The answer so far is kept."
        return "Stopped before the answer began: the question was dropped."

    def _figures(self) -> str:
        """One line of the last answer's figures."""
        report, talk = self._flash.report(), self._talk
        facts = [f"{report.generation_tokens} tokens"]
        if report.tokens_per_s:
            facts[0] += f", {report.tokens_per_s:.1f}/s"
        if report.time_to_first_token_s is not None:
            facts.append(f"first after {report.time_to_first_token_s:.1f} s")
        if talk.cached_tokens:
            facts.append(f"{talk.cached_tokens:,} not read again")
        if report.hit_rate is not None:
            facts.append(f"{report.hit_rate:.0%} of {report.unit}s in memory")
        if report.lossy:
            facts.append(report.lossy)
        used, given = report.peak_memory_bytes, report.memory_budget_bytes
        facts.append(f"{_size(used)} of {_size(given)}")
        return " · ".join(facts)

    def _help(self, _: str) -> None:
        width = max(map(len, HELP))
        for usage, meaning in HELP.items():
            self._screen.text(f"{usage:{width}}  {meaning}")
        self._screen.text(KEYS)

    def _reset(self, _: str) -> None:
        self._talk.reset()
        self._screen.note("A new conversation.")

    def _system(self, text: str) -> None:
        if text and not self._talk.has_template:
            raise FlashError("This model has no chat template: nobody would read that.")
        if text:
            self._talk.system = text
        told = self._talk.system
        self._screen.note(f"System prompt: {told}" if told else "No system prompt.")

    def _save(self, name: str) -> None:
        self._talk.save(_named(name, "/save"))
        self._screen.note(f"{len(self._talk.messages)} messages written to {name}.")

    def _load(self, name: str) -> None:
        self._talk.load(_named(name, "/load"))
        self._screen.note(f"{len(self._talk.messages)} messages read from {name}.")

    def _stats(self, _: str) -> None:
        self._screen.text(str(self._flash.report()))

    def _memory(self, size: str) -> None:
        if size:
            try:
                self._flash.resize(size)
            except NotEnoughMemory as error:
                least = say_memory(error.least_bytes)
                raise FlashError(
                    f"{size} is too little: the model needs {least}, and goes on with "
                    "what it has."
                ) from error
        nbytes = self._flash.budget.total_bytes + self._flash.draft_bytes
        self._screen.note(f"Memory: {_size(nbytes)}.")


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def _named(name: str, command: str) -> str:
    if not name:
        raise FlashError(f"Name a file: {command} talk.json")
    return name
