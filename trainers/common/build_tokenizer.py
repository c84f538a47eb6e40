"""Build the small byte-level BPE tokenizer of the embedded checkpoint from generated word problems.

    python trainers/common/build_tokenizer.py --output_dir tokenizer

It follows LLaDA's special tokens and chat template, falls back to bytes so that any text round-trips, and holds every
integer from 0 to 199 as one token. The build is deterministic: the same version of `tokenizers` writes the same file.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from d3llm_hf.evaluation.tasks.word_problems import generate_problems


BOS, EOS, HEADER_START, HEADER_END, EOT, MASK = SPECIAL_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|mdm_mask|>",
)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim "
    "+ '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{% endif %}"
)
"""LLaDA's chat format; unlike the published template, the assistant header appears only when asked for, so that the
same template renders finished conversations for training."""

# Order matters: numbers stand alone in groups of up to three digits as in Llama 3. A space before a number belongs to
# the word or sign in front of it, so that "17" is the same token at the start of a line and after "buys ".
_PIECES = (
    r"\p{N}{1,3}"
    r"| ?\p{L}+(?: (?=\p{N}))?"
    r"| ?[^\s\p{L}\p{N}]+(?: (?=\p{N})|[\r\n]+)?"
    r"|\s*[\r\n]+"
    r"|\s+"
)


def build_tokenizer(
    *, vocab_size: int = 768, num_problems: int = 20_000, seed: int = 0, model_max_length: int = 256
) -> PreTrainedTokenizerFast:
    """Train the tokenizer on `num_problems` generated training problems.

    Args:
        vocab_size (`int`, defaults to 768): Upper bound for all entries: 6 special tokens, 256 bytes, the integers
            10-199 (the digits are bytes) and the learnt words.
        num_problems (`int`, defaults to 20000): Problems to read.
        seed (`int`, defaults to 0): Seed of those problems.
        model_max_length (`int`, defaults to 256): Longest prompt with its answer.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`], padding on the left, with a chat template.

    Raises:
        ValueError: If `vocab_size` leaves no room for the fixed entries, or there is nothing to read.
    """
    integers = [str(value) for value in range(10, 200)]
    fixed = len(SPECIAL_TOKENS) + 256 + len(integers)
    if vocab_size < fixed:
        raise ValueError(
            f"`vocab_size` must be at least {fixed} (special tokens, bytes and the integers up to 199; "
            f"got {vocab_size}). Pass {fixed} or more."
        )
    if num_problems < 1:
        raise ValueError(f"`num_problems` must be at least 1 (got {num_problems}). The default is 20000.")

    vocab, merges = _learn_words(vocab_size - len(SPECIAL_TOKENS) - len(integers), num_problems, seed)
    for integer in integers:
        vocab[integer] = len(vocab)
    # `ignore_merges` takes a piece that is in the vocabulary whole, which is what makes the integers single tokens.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        mask_token=MASK,
        additional_special_tokens=[HEADER_START, HEADER_END, EOT],
        padding_side="left",
        truncation_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        model_max_length=model_max_length,
    )


def _pre_tokenizer(*, single_digits: bool = False) -> pre_tokenizers.PreTokenizer:
    stages = [pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")]
    if single_digits:
        stages.append(pre_tokenizers.Digits(individual_digits=True))
    stages.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return pre_tokenizers.Sequence(stages)


def _learn_words(vocab_size: int, num_problems: int, seed: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-level BPE over the problems' texts, as `(vocabulary, merges)`, without any merge of digits."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = _pre_tokenizer(single_digits=True)
    learner.train_from_iterator(
        _texts(num_problems, seed),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=20,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    model = json.loads(learner.to_str())["model"]
    return dict(model["vocab"]), [tuple(merge) for merge in model["merges"]]


def _texts(num_problems: int, seed: int) -> Iterator[str]:
    for problem in generate_problems(num_problems, split="train", seed=seed):
        yield from ("user", "assistant", "\n\n", problem.question, problem.answer)


def main(argv: list[str] | None = None) -> None:
    """Command line: write `tokenizer.json`, its configuration and the chat template into a folder."""
    parser = argparse.ArgumentParser(description="Build the tokenizer of the embedded checkpoint.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder to write to.")
    parser.add_argument("--vocab_size", type=int, default=768, help="Upper bound for the number of entries.")
    parser.add_argument("--num_problems", type=int, default=20_000, help="Generated problems to learn words from.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of those problems.")
    args = parser.parse_args(argv)
    tokenizer = build_tokenizer(vocab_size=args.vocab_size, num_problems=args.num_problems, seed=args.seed)
    tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
