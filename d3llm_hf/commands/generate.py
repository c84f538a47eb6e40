"""`d3llm generate`: answer a prompt, and say what it took."""

import argparse
import json
import sys
import time
from typing import Any

from ..hub.loading import decodes_by_diffusion, load
from ..progress import DecidedTokens
from ..settings import SETTINGS
from ..watch.terminal import CanvasStreamer, can_redraw, printable
from . import generate_causal
from .common import new_parser, tell


# Types of options of transformers that are often wanted.
OTHERS: dict[str, type] = {
    "do_sample": bool, "max_new_tokens": int, "temperature": float, "top_p": float, "top_k": int, "min_p": float,
    "repetition_penalty": float,
}  # fmt: skip
DEFAULT_NEW_TOKENS = 128


def add_parser(subparsers) -> None:
    parser = new_parser(subparsers, "generate", run, "Answer a prompt")
    add_options(parser)
    parser.add_argument("--watch", action="store_true", help="show the canvas being decided (on a terminal)")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that answers a prompt; `prepare` reads them."""
    add_model_options(parser)
    parser.add_argument("prompt", nargs="?", default="-", help='the prompt; "-" (the default) reads it from stdin')
    parser.add_argument("--chat", action="store_true", help="put the prompt into the checkpoint's chat template")
    parser.add_argument("--system", help="system message, with --chat")
    add_decoding_options(parser)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The model and where it runs: the arguments of `load`."""
    parser.add_argument("model", help="a checkpoint folder, an id on the Hub, or the name of an embedded checkpoint")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: the checkpoint's)")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")


def add_decoding_options(parser: argparse.ArgumentParser) -> None:
    """How an answer is decoded: its length, and all settings; `chosen_settings` reads the latter."""
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help=f"length of the canvas ({DEFAULT_NEW_TOKENS})")
    parser.add_argument("--temperature", type=float, metavar="T", help="sample at this temperature; 0 does not sample")
    add_settings(parser)


def add_settings(parser: argparse.ArgumentParser, without: tuple[str, ...] = ()) -> None:
    """Adds an option for each setting of decoding."""
    group = parser.add_argument_group("decoding", "What is not given keeps the checkpoint's value.")
    for name, (kind, text) in SETTINGS.items():
        flag = f"--{name.replace('_', '-')}"
        if name in without:
            continue
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            group.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=text)


def run(args: argparse.Namespace) -> None:
    prompt = prompt_of(args)
    if decodes_by_diffusion(args.model, revision=args.revision):
        model, tokenizer, inputs, settings = _prepared(args, prompt)
        start = time.perf_counter()
        output = model.generate(
            **inputs,
            **settings,
            streamer=_watcher(tokenizer, args.watch) or _counter(model, settings),
            return_dict_in_generate=True,
        )
    else:
        model, tokenizer, method, settings = generate_causal.prepare(args, chosen_settings(args))
        inputs = _encode(tokenizer, prompt, args).to(model.device)
        start = time.perf_counter()
        output = generate_causal.answer(model, inputs, method, settings, length_of(args, model))
    seconds = time.perf_counter() - start
    answer = output.sequences[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(answer, skip_special_tokens=True)
    sys.stdout.write((printable(text) if sys.stdout.isatty() else text) + "\n")
    sys.stdout.flush()
    if tokenizer.chat_template is not None and not args.chat:
        tell("the prompt was continued as it stands; --chat puts it into the checkpoint's chat template")
    tell(statistics(output, seconds))


def prepare(args: argparse.Namespace):
    """What the options ask for: prompt, model, tokenizer, the encoded prompt (one row), arguments of `generate`."""
    prompt = prompt_of(args)
    return prompt, *_prepared(args, prompt)


def prompt_of(args: argparse.Namespace) -> str:
    """The prompt as it was typed or piped in."""
    if args.system is not None and not args.chat:
        raise ValueError(f"`--system` needs `--chat` (got {args.system!r} without it). Add `--chat`.")
    return _read_prompt(args.prompt)


def _prepared(args: argparse.Namespace, prompt: str) -> tuple[Any, Any, Any, dict[str, Any]]:
    model, tokenizer = load(args.model, device=args.device, dtype=args.dtype, revision=args.revision)
    inputs = _encode(tokenizer, prompt, args).to(model.device)
    settings = chosen_settings(args)
    limits = (model.generation_config.max_new_tokens, model.generation_config.max_length)
    if args.max_new_tokens is not None or limits == (None, None):
        settings["max_new_tokens"] = length_of(args, model)
    return model, tokenizer, inputs, settings


def length_of(args: argparse.Namespace, model: Any) -> int:
    """Most tokens of an answer: as the option says, the checkpoint, or the default."""
    if args.max_new_tokens is not None:
        return args.max_new_tokens
    return model.generation_config.max_new_tokens or DEFAULT_NEW_TOKENS


def chosen_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `generate` that options of a command line ask for, without its length."""
    settings = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    return settings if args.temperature is None else settings | sampling(args.temperature)


def sampling(temperature: float) -> dict[str, Any]:
    """The arguments of `generate` for a temperature, where 0 does not sample."""
    return {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}


def name_and_value(option: str, text: str) -> tuple[str, Any]:
    """A setting and its value, written `NAME=VALUE`, with hyphens or underscores in the name.

    Raises:
        ValueError: for another form or type; names `option`.
    """
    name, mark, value = text.partition("=")
    name = name.replace("-", "_")
    if not mark or not name:
        raise ValueError(f"`{option}` must have the form NAME=VALUE (got {text!r}).")
    return name, value_of(option, name, value)


def value_of(option: str, name: str, text: str) -> Any:
    """A value of the type of its setting; of other arguments of `generate` a JSON value, or else the text.

    Raises:
        ValueError: for another type; names `option`.
    """
    kind = SETTINGS[name][0] if name in SETTINGS else OTHERS.get(name)
    truths = {"true": True, "false": False}
    if kind is not None:
        try:
            return truths[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError) as error:
            raise ValueError(f"`{option}` must give {name} a value of type {kind.__name__} (got {text!r}).") from error
    try:
        return truths[text.lower()] if text.lower() in truths else json.loads(text)
    except ValueError:
        return text


def statistics(output, seconds: float) -> str:
    """One line about a generation of one row: tokens before the stop token, forwards, their ratio, and time."""
    forwards = int(output.num_forwards[0])
    per_forward, tokens = float(output.tokens_per_forward[0]), int(output.num_tokens[0])
    return (
        f"{tokens} tokens in {forwards} forwards ({per_forward:.2f} tokens per forward), {seconds:.2f} s "
        f"({tokens / max(seconds, 1e-9):.1f} tokens/s)"
    )


def _read_prompt(prompt: str) -> str:
    if prompt != "-":
        return prompt
    if sys.stdin is None or sys.stdin.isatty():
        tell("reading the prompt from the terminal, end it with Ctrl-D")
    try:
        text = sys.stdin.read() if sys.stdin is not None else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"`prompt` must be text (got {error} on stdin). Convert it to UTF-8.") from error
    if not text.strip():
        raise ValueError("`prompt` must not be empty (got nothing on stdin). Pass it as an argument or pipe it in.")
    return text.rstrip("\n")


def _encode(tokenizer, prompt: str, args: argparse.Namespace):
    from ..text import encode_chat, encode_text

    if not args.chat:
        return encode_text(tokenizer, prompt)
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return encode_chat(tokenizer, [*system, {"role": "user", "content": prompt}])


def _watcher(tokenizer, watch: bool):
    if not watch:
        return None
    if not can_redraw(sys.stdout):
        tell("--watch needs a terminal, the answer follows when it is complete")
        return None
    return CanvasStreamer(tokenizer)


def _counter(model, settings: dict[str, Any]) -> DecidedTokens | None:
    """A bar of decided tokens, where it would be seen."""
    from ..models.text_config import text_setting

    counter = DecidedTokens(canvas_length(model, settings), text_setting(model.config, "mask_token_id"))
    return None if counter.bar.disable else counter


def canvas_length(model, settings: dict[str, Any]) -> int | None:
    """Positions that an answer may have, where the settings or the checkpoint say so."""
    return settings.get("max_new_tokens", model.generation_config.max_new_tokens)
