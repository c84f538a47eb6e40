"""`d3llm chat`: a conversation in a terminal, or over pipes."""

import argparse
import contextlib
import difflib
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..hub.loading import load
from ..watch.terminal import Redrawn, can_redraw, printable
from .common import new_parser, tell
from .generate import (
    add_decoding_options,
    add_model_options,
    chosen_settings,
    name_and_value,
    sampling,
    statistics,
)


PROMPT, CONTINUED = "> ", ". "


def add_parser(subparsers) -> None:
    parser = new_parser(subparsers, "chat", run, "Talk with a model and watch it denoise its answers")
    add_model_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--history", type=int, metavar="N", help="earlier turns that are sent at most (all that fit)")
    parser.add_argument("--no-live", action="store_true", help="show text when it is final, and no drafts")
    add_decoding_options(parser)


def run(args: argparse.Namespace) -> None:
    model, tokenizer = load(args.model, device=args.device, dtype=args.dtype, revision=args.revision)

    from ..watch.chat import Chat

    settings = chosen_settings(args)
    if args.max_new_tokens is not None:
        settings["max_new_tokens"] = args.max_new_tokens
    chat = Chat(model, tokenizer, system=args.system, history=args.history, **settings)
    Console(chat, args.model, live=not args.no_live, debug=args.debug).talk()


class Console:
    """Reads messages and commands from stdin, writes answers to stdout and all else to stderr.

    Where stdin is no terminal, the first error ends the conversation: what follows may depend on it.

    Args:
        chat ([`Chat`][d3llm_hf.watch.chat.Chat]): the conversation.
        model: what the user calls the model.
        live: draw drafts, where stdout is a terminal that can redraw.
        debug: let errors end the conversation.
    """

    def __init__(self, chat, model: str, *, live: bool = True, debug: bool = False):
        self.chat, self.model, self.debug = chat, model, debug
        self.interactive = sys.stdin is not None and sys.stdin.isatty()
        self.live = live and can_redraw(sys.stdout)
        self.left_out = 0  # turns whose leaving out the user knows of
        self.saved: set[Path] = set()  # files that may be written again
        self.ended = False

    def talk(self) -> None:
        """Holds the conversation, until `/quit` or the end of the input."""
        if self.interactive:
            if can_redraw(sys.stdout):
                with contextlib.suppress(ImportError):  # input() then has a history and lines can be edited
                    importlib.import_module("readline")
            tell(f"{self.model}, {self._summary()}. /help lists the commands, Ctrl-D ends.")
        warned = False
        while not self.ended:
            try:
                message = self._read()
                if message is None:
                    break
                warned = False
                if message.strip():
                    self._take(message)
            except KeyboardInterrupt:
                if warned or not self.interactive:
                    raise
                warned = True
                tell("\nPress Ctrl-C again or type /quit to end.")

    # ---- input ---------------------------------------------------------------------------------------------------

    def _read(self) -> str | None:
        """The next message, of lines that end with a backslash and the one after them; None at the end."""
        lines: list[str] = []
        while True:
            prompt = (CONTINUED if lines else PROMPT) if self.interactive else ""
            try:
                if prompt and not sys.stdout.isatty():  # stdout holds answers alone
                    sys.stderr.write(prompt)
                    sys.stderr.flush()
                    prompt = ""
                lines.append(input(prompt) if sys.stdin is not None else "/quit")
            except EOFError:
                if self.interactive:
                    tell("")
                return "\n".join(lines) if lines else None
            except UnicodeDecodeError as error:
                raise ValueError(f"A message must be text (got {error} on stdin). Convert it to UTF-8.") from error
            if not lines[-1].endswith("\\"):
                return "\n".join(lines)
            lines[-1] = lines[-1][:-1]

    def _take(self, message: str) -> None:
        """Carries out a command or answers; with a user at a terminal, errors that a user can mend are shown."""
        from torch import OutOfMemoryError

        try:
            if message.startswith("/") and not message.startswith("//"):
                self._command(message[1:])
            else:
                self._answer(message[1:] if message.startswith("//") else message)
        except BrokenPipeError:
            raise
        except (ValueError, TypeError, OSError, OutOfMemoryError) as error:
            if self.debug or not self.interactive:
                raise
            hint = " Try /reset or a lower max_new_tokens." if isinstance(error, OutOfMemoryError) else ""
            tell(f"error: {' '.join(str(error).split()) or type(error).__name__}{hint}")

    # ---- answers -------------------------------------------------------------------------------------------------

    def _answer(self, message: str) -> None:
        turn = self.chat.ask(message)
        if turn.left_out > self.left_out:
            tell(f"(The oldest turns no longer fit: {turn.left_out} left out from now on.)")
        self.left_out = turn.left_out
        screen = Redrawn(sys.stdout) if self.live else None
        try:
            for update in turn:
                if screen is None:
                    self._write(update.text)
                else:
                    screen.draw(turn.text, update.draft or "")
        except KeyboardInterrupt:
            turn.stop()
            if not self.interactive:
                raise
        finally:
            if screen is not None:
                screen.erase()
        self._write((turn.text if screen is not None else "") + "\n")
        if turn.stopped:
            what = "What is shown is kept as the answer, /undo takes it back" if turn.text else "The turn is dropped"
            tell(f"stopped after {turn.tokens} token{'' if turn.tokens == 1 else 's'}. {what}.")
        else:
            tell(statistics(turn.output, turn.seconds))

    def _write(self, text: str) -> None:
        sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()

    # ---- commands ------------------------------------------------------------------------------------------------

    def _command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        name, argument = name.strip(), argument.strip()
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"Did you mean /{near[0]}?" if near else "/help lists them."
            raise ValueError(f"`/{name}` is no command. {hint} (A message that begins with a slash is written //...)")
        COMMANDS[name][0](self, argument)

    def _help(self, argument: str) -> None:
        width = max(len(usage) for _, usage, _ in COMMANDS.values())
        lines = [f"{usage:{width}}  {text}" for _, usage, text in COMMANDS.values()]
        lines.append("A line that ends with a backslash goes on in the next one; a message may begin with //.")
        lines.append("Ctrl-C stops an answer, and keeps what is decided of it.")
        tell("\n".join(lines))

    def _set(self, argument: str) -> None:
        if not argument:
            raise ValueError("`/set` needs settings (got nothing). Write /set entropy_threshold=0.3 block_length=16.")
        changes: dict[str, Any] = {}
        for word in argument.split():
            if word.endswith("="):
                changes[word[:-1].replace("-", "_")] = None
                continue
            name, value = name_and_value("/set", word)
            changes |= {"temperature": None} | sampling(value) if name == "temperature" else {name: value}
        if "temperature" in changes and "do_sample" not in changes and changes["temperature"] is None:
            changes["do_sample"] = None
        self.chat.set(**changes)
        tell(self._summary())

    def _method(self, argument: str) -> None:
        if not argument:
            from ..models.methods import METHODS

            raise ValueError(f"`/method` needs one of {', '.join(METHODS)} (got nothing).")
        forgotten = self.chat.use_method(argument)
        if forgotten:
            tell(f"forgotten with the method before it: {_pairs(forgotten)}")
        tell(self._summary())

    def _settings(self, argument: str) -> None:
        chosen = self.chat.settings
        for name, value in self.chat.effective().items():
            tell(f"{name}={'' if value is None else value}{' (set)' if name in chosen else ''}")

    def _reset(self, argument: str) -> None:
        self.chat.reset()
        tell("The history is empty.")

    def _undo(self, argument: str) -> None:
        self.chat.undo()
        tell(f"The last turn is taken back, {len(self.chat.messages) // 2} left.")

    def _save(self, argument: str) -> None:
        if not argument:
            raise ValueError("`/save` needs a file (got nothing). Write /save conversation.json.")

        from ..evaluation.provenance import write_json

        file = Path(os.path.abspath(Path(argument).expanduser()))
        if file.exists() and file not in self.saved:
            raise FileExistsError(f"`/save` does not replace a file (got {argument!r}, which exists). Name another.")
        write_json(
            file, {"model": self.model, "messages": self.chat.conversation(), "settings": self.chat.effective()}
        )
        self.saved.add(file)
        tell(f"wrote {file}")

    def _system(self, argument: str) -> None:
        self.chat.set_system(argument or None)
        tell("The system message is set." if argument else "There is no system message.")

    def _quit(self, argument: str) -> None:
        self.ended = True

    def _summary(self) -> str:
        values = self.chat.effective()
        names = ("decoding_method", "max_new_tokens")
        others = {name: value for name, value in self.chat.settings.items() if name not in names}
        return _pairs({name: values[name] for name in names} | others)


def _pairs(settings: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())


# Name -> what carries it out, how it is written, and what it does.
COMMANDS: dict[str, tuple[Callable[[Console, str], None], str, str]] = {
    "help": (Console._help, "/help", "show this"),
    "set": (Console._set, "/set NAME=VALUE ...", "change settings of decoding; NAME= goes back to the checkpoint's"),
    "method": (
        Console._method,
        "/method NAME",
        "change the decoding method, and forget the settings of the one before",
    ),
    "settings": (Console._settings, "/settings", "show all settings and their values"),
    "reset": (Console._reset, "/reset", "forget all turns"),
    "undo": (Console._undo, "/undo", "take back the last turn"),
    "save": (Console._save, "/save FILE", "write the conversation as JSON"),
    "system": (Console._system, "/system TEXT", "change the system message; without TEXT remove it"),
    "quit": (Console._quit, "/quit", "end"),
}
