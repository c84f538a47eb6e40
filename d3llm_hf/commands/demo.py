"""`d3llm demo`: a page on which to watch answers being decided."""

import argparse

from ..hub.loading import load
from .common import check_address, new_parser
from .generate import add_model_options


def add_parser(subparsers) -> None:
    parser = new_parser(subparsers, "demo", run, "Open a page on which to watch answers being decided")
    add_model_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all (%(default)s)")
    parser.add_argument("--port", type=int, metavar="N", help="port to listen on (the first free one from 7860)")
    parser.add_argument(
        "--concurrency", type=int, default=2, metavar="N", help="answers decided at a time; others wait (%(default)s)"
    )
    parser.add_argument("--share", action="store_true", help="make a public link through gradio's servers")


def run(args: argparse.Namespace) -> None:
    from ..demo import build, launch

    if args.concurrency < 1:
        raise ValueError(f"`--concurrency` must be a positive integer (got {args.concurrency}). Pass 1 or more.")
    if args.port is not None:
        check_address(args.host, args.port)
    model, tokenizer = load(args.model, device=args.device, dtype=args.dtype, revision=args.revision)
    page = build(model, tokenizer, name=args.model, concurrency=args.concurrency)
    launch(page, host=args.host, port=args.port, share=args.share)
