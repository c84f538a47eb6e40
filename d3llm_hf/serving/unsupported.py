"""What OpenAI's API has and a diffusion model cannot keep: taken where it asks for nothing, refused by name where not.

Clients send many of these fields as a matter of course, with the value that changes nothing.
"""

from typing import Any

from .errors import ApiError


Table = dict[str, tuple[tuple[Any, ...], str]]

# Parameter of a request -> values that ask for nothing, and the way out for the others.
PARAMETERS: Table = {
    "n": ((1,), "Send one request for each answer, they are decoded together."),
    "best_of": ((1,), "Send one request for each answer, they are decoded together."),
    "echo": ((False,), "Put the prompt before the answer yourself."),
    "suffix": (("",), "Fill gaps with the library's `generate(infill_mask=...)`."),
    "logprobs": ((False,), "Positions are decided at different forwards; see `log_likelihood` of the library."),
    "top_logprobs": ((0,), "Positions are decided at different forwards; see `log_likelihood` of the library."),
    "logit_bias": (({},), "Leave it out."),
    "presence_penalty": ((0,), 'Use `{"d3llm": {"repetition_penalty": 1.1}}`.'),
    "frequency_penalty": ((0,), 'Use `{"d3llm": {"repetition_penalty": 1.1}}`.'),
    "tools": (([],), "Describe the tools in a message and read the answer yourself."),
    "tool_choice": (("none", "auto"), "Leave it out."),
    "parallel_tool_calls": ((True, False), "Leave it out."),
    "functions": (([],), "Describe the functions in a message and read the answer yourself."),
    "function_call": (("none", "auto"), "Leave it out."),
    "modalities": ((["text"],), "Answers are text."),
    "audio": ((), "Answers are text."),
    "prediction": ((), "Leave it out."),
    "reasoning_effort": (("none",), "Leave it out."),
    "verbosity": (("medium",), "Ask for it in a message."),
    "web_search_options": ((), "Leave it out."),
    "service_tier": (("auto", "default"), "Leave it out."),
    "store": ((False,), "Nothing is stored here."),
    "metadata": (({},), "Nothing is stored here."),
    "moderation": ((), "Leave it out."),
    "prompt_cache_options": (({},), "Nothing is kept between requests here."),
    "prompt_cache_retention": (("in-memory", "in_memory"), "Nothing is kept between requests here."),
}

# The same for the fields of a message.
IN_MESSAGE: Table = {
    "tool_calls": (([],), "Write the calls into its content."),
    "function_call": ((), "Write the call into its content."),
    "tool_call_id": (("",), "Write the result into the content of a user's message."),
    "refusal": (("",), "Write it into its content."),
    "audio": ((), "Messages are text."),
    "images": (([],), "Messages are text."),
    "annotations": (([],), "Leave it out."),
    "reasoning": (("",), "Leave it out, or write it into its content."),
    "reasoning_content": (("",), "Leave it out, or write it into its content."),
    "reasoning_details": (([],), "Leave it out, or write it into its content."),
    "thinking_blocks": (([],), "Leave it out, or write it into its content."),
    "provider_specific_fields": (({},), "Leave it out."),
}

# And for those of `stream_options`.
IN_STREAM_OPTIONS: Table = {"include_obfuscation": ((False,), "Leave it out.")}


def without_unsupported(values: dict[str, Any], table: Table, known: Any, path: str = "") -> dict[str, Any]:
    """`values` without what asks for nothing: fields of the table with a neutral value, and `null` everywhere.

    Args:
        known: names that mean something here, whatever the table says of them.
        path: of `values` within the request.

    Raises:
        ApiError: 400, for a field of the table that asks for something.
    """
    kept = {}
    for name, value in values.items():
        if value is None:
            continue
        if name in known or name not in table:
            kept[name] = value
            continue
        neutral, way_out = table[name]
        # 0 is not False
        if not any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral):
            raise ApiError(
                400,
                f"`{path}{name}` is not supported by this server. {way_out}",
                param=f"{path}{name}",
                code="unsupported_parameter",
            )
    return kept
