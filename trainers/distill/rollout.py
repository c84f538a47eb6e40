"""The states that a student's own threshold decode visits, with the reference text written into them.

A trajectory's states are those of a teacher that decides one token a forward. Decoding several blocks at once visits
others: some blocks partly decided, what is hard (numbers) hidden to the last. So the student decodes, and what it
decides is replaced by the text to learn, which keeps each state consistent with its labels:

1. all of the answer is hidden, and the first block open;
2. another block opens where the last one has got far enough: the decoder's own rule, by the decoder's own code;
3. a forward without gradient; in open blocks every hidden position of at most a threshold's entropy is decided, and
   always the row's surest; the reference token is written there;
4. once the end-of-text token is decided, so is the fill behind it, as in the decoder;
5. again from 2, until all content is decided or `max_forwards` are made.

Pure functions over the answers of a batch: B rows of R positions, N of them asked about. They know no model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from d3llm_hf.models.decoding import Rules, State, candidates, commit, fill_after_stop, open_blocks
from d3llm_hf.models.methods import METHODS


# What the entropies of a forward are asked for with: what is hidden `(B, R)`, and where to tell `(B, R)`.
EntropyAt = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Rollout:
    """S states of B rows, the first with everything hidden.

    Args:
        hidden (`torch.BoolTensor` of shape `(S, B, R)`): Positions that are not decided.
        region (`torch.BoolTensor` of shape `(S, B, R)`): Positions of the open blocks and of the next one.
        counts (`torch.LongTensor` of shape `(B,)`): How many of a row's states have content to decide, the first ones
            of it; at least 1.
        forwards (`torch.LongTensor` of shape `(B,)`): Forwards that a row took part in.
    """

    hidden: torch.Tensor
    region: torch.Tensor
    counts: torch.Tensor
    forwards: torch.Tensor

    def select(self, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`hidden` and `region`, both `(K, B, R)`, of the states that K numbers of [0, 1) a row, `(K, B)`, choose."""
        index = (uniforms.to(self.counts.device) * self.counts).long()
        rows = torch.arange(len(self.counts), device=self.counts.device)
        return self.hidden[index, rows], self.region[index, rows]


def roll_out(
    labels: torch.Tensor,
    content_lengths: torch.Tensor,
    thresholds: torch.Tensor,
    entropy_at: EntropyAt,
    *,
    block_length: int,
    max_forwards: int,
    stop_token_id: int,
    anyone: Callable[[torch.Tensor], bool] = lambda left: bool(left.any()),
) -> Rollout:
    """Decode every row, its reference text being written at what is decided.

    Args:
        labels (`torch.LongTensor` of shape `(B, R)`): The text to learn; -100 behind it.
        content_lengths (`torch.LongTensor` of shape `(B,)`): Its length without the fill.
        thresholds (`torch.FloatTensor` of shape `(B,)`): Entropy, in nats, up to which a position is decided.
        entropy_at (`Callable`): Given what is hidden `(B, R)` and N positions of it as a mask `(B, R)`, the entropies
            `(N,)` of the student's predictions there, row by row. Rows without a position need no forward.
        block_length (`int`), max_forwards (`int`): Of the decoding.
        stop_token_id (`int`): The token that ends an answer.
        anyone (`Callable`, *optional*): Whether any row is left, given which are `(B,)`; the same in all processes
            where these must make the same number of forwards.
    """
    # 1. All is hidden, one block is open
    text, device = labels.ne(-100), labels.device
    rules = Rules(
        block_length=block_length,
        score="entropy",
        select="threshold",
        block_add_threshold=METHODS["d3llm"]["block_add_threshold"],
        early_stop=True,
        eos_fill=True,
    )
    column = torch.arange(labels.shape[1], device=device)
    content = text & (column < content_lengths.to(device)[:, None])
    stop_ids = torch.tensor([stop_token_id], device=device)
    state = State.start(labels, text, rules)
    stop, thresholds = state.stop(stop_ids, text), thresholds.to(device)
    hidden, region = [], []
    made = 0
    forwards = torch.zeros_like(state.length)
    while True:
        # 2. Another block
        open_blocks(state, rules, stop)
        hidden.append(state.undecided)
        region.append(text & (column < state.reach(rules, ahead=1)[:, None]))
        left = (state.undecided & content).any(1)
        if made == max_forwards or not anyone(left):
            break
        # 3. What a forward is sure of
        among = candidates(state, rules) & left[:, None]
        entropy = torch.full(labels.shape, torch.inf, device=device)
        entropy[among] = entropy_at(state.undecided, among).to(entropy)
        surest = torch.zeros_like(among).scatter(1, entropy.argmin(1, keepdim=True), True)
        made, state.forward = made + 1, state.forward + 1
        forwards += left
        commit(state, among & ((entropy <= thresholds[:, None]) | surest), labels)
        # 4. The fill
        stop = state.stop(stop_ids, text)
        fill_after_stop(state, stop, stop_token_id)
    states = torch.stack(hidden)
    return Rollout(
        hidden=states,
        region=torch.stack(region),
        counts=(states & content).any(-1).sum(0).clamp_min(1),
        forwards=forwards,
    )


def entropies(logits: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """Entropies `(N,)`, in nats, of N rows of logits `(N, V)`, in float32 a few rows at a time."""
    return torch.cat([torch.special.entr(rows.float().softmax(-1)).sum(-1) for rows in logits.split(chunk_size)])
