"""Chat templates that a family's own code puts in the place of those of its published tokenizers."""

import re
from typing import Any


_THINKING = (
    "You should first think about the reasoning process in the mind and then provide the user with the answer. The "
    "reasoning process is enclosed within <think> </think> tags, i.e. <think> reasoning process here </think> answer "
    "here"
)
MMADA = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n"
    "{% if enable_thinking and message['role'] == 'user' and loop.last %}" + _THINKING + "\n{% endif %}"
    "{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n{% endif %}"
)
"""MMaDA's (generate.py and app.py): one newline behind a header, where LLaDA has two.

The official one ends with the header of an answer whatever it is asked; this one where it is asked, as trainers need.
`enable_thinking=True` puts the instruction of MixCoT before the last question.
"""

# Template that a published tokenizer has -> that of the family's code.
_PUBLISHED = {"mmada": (re.compile(r"<\|end_header_id\|>(\n|\\n){2}"), MMADA)}


def own_template(model_type: str | None, published: str | dict[str, str] | None) -> str | None:
    """The template that takes the place of a tokenizer's, `None` where that stays.

    Args:
        model_type: of the model's config.
        published: the tokenizer's. One that is not LLaDA's is the owner's choice, and stays.
    """
    if model_type not in _PUBLISHED:
        return None
    theirs, ours = _PUBLISHED[model_type]
    return ours if published is None or (isinstance(published, str) and theirs.search(published)) else None


def use_own_template(tokenizer: Any, model_type: str | None) -> Any:
    """The tokenizer, with the template of its family's own code where it was published with another family's."""
    template = own_template(model_type, getattr(tokenizer, "chat_template", None))
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer
