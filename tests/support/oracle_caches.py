"""Which slots each forward of the oracle recomputes, one rule a cache, one slot after the other.

A forwarded token overwrites the key and value of its slot at every layer and attends to all slots. The slots whose
rows predict the candidates are always among them; where logits row i predicts token i + 1, a window therefore starts
one slot earlier.
"""

import math


class Windows:
    """The part of the oracle that decides this.

    It reads `rules`, `network`, `canvas`, `length`, `blocks` and `activated` (the blocks created so far, the prompt
    being block 0), `forwards` (made so far), `committed` (position -> forward), `canvas_before` (of the last forward),
    and `current` and `opened` (first and last slot of the blocks at work, forwards made before they were opened).
    """

    def slots(self, wanted: list[int]) -> list[int]:
        """The slots that the next forward recomputes, given the positions that it must predict."""
        planned = {
            "none": self.everything,
            "delayed": self.delayed,
            "prefix": self.prefix,
            "dual": self.dual,
            "vicinity": self.vicinity,
            "sliding": self.sliding,
            "dkv": self.dkv,
            "dkv_greedy": lambda: self.dkv_greedy(wanted),
        }[self.rules.kv_cache]()
        kept_at_once = self.rules.kv_cache.startswith("dkv") and not self.rules.cache_delay
        if self.rules.kv_cache not in ("none", "delayed") and not kept_at_once:
            planned |= self.changed()
        return sorted(planned | {self.network.source(position) for position in wanted})

    def changed(self) -> set[int]:
        """What has been decided, or filled, since the last forward: its kept keys belong to another token."""
        before = self.canvas_before or self.canvas
        return {slot for slot in range(self.length) if before[slot] != self.canvas[slot]}

    def everything(self) -> set[int]:
        return set(range(self.length))

    def window(self, start: int, end: int) -> set[int]:
        """`[start, end)` cut to the canvas, and the slot before it under a shift."""
        before = 0 if self.rules.blind_block_start else self.network.shift
        return set(range(max(start - before, 0), min(end, self.length)))

    def is_first_or_refresh(self) -> bool:
        """Whether this is the first forward of the block, or one of those that refresh it."""
        i = self.forwards - self.opened
        every = self.rules.cache_refresh_interval
        return i == 0 or (every is not None and i % every == 0)

    # windows of blocks

    def prefix(self) -> set[int]:
        """Fast-dLLM: what lies before the block is kept."""
        if self.is_first_or_refresh():
            return self.everything()
        return self.window(self.current[0], self.length)

    def dual(self) -> set[int]:
        """Fast-dLLM: what lies before and behind the block is kept."""
        if self.is_first_or_refresh():
            return self.everything()
        return self.window(*self.current)

    def vicinity(self) -> set[int]:
        """dInfer: what lies far from the block is kept, once the first forwards are over."""
        now, around = self.forwards + 1, self.rules.cache_window
        if self.is_first_or_refresh() or now <= self.rules.cache_warmup:
            return self.everything()
        return self.window(self.current[0] - around, self.current[1] + around)

    def sliding(self) -> set[int]:
        """DSB: what lies far before the window, or behind it, is kept; what the window slid over is not yet."""
        if self.is_first_or_refresh():
            return self.everything()
        start = min(self.current[0] - self.rules.cache_window, min(self.changed(), default=self.length))
        return self.window(start, self.current[1])

    def delayed(self) -> set[int]:
        """d3LLM: finished blocks are kept once their delay is over; stamps and caches them on the way."""
        rules, now, commit_to = self.rules, self.forwards + 1, self.cached_length
        every = rules.cache_refresh_interval
        for block in sorted(self.activated):
            if 0 < self.blocks[block][1] <= self.cached_length:
                continue
            if self.masks(block):
                break
            self.completed.setdefault(block, now)
            if now - self.completed[block] >= rules.cache_delay:
                self.cached.add(block)
                commit_to = self.blocks[block][1]
            elif rules.serial_stamps:
                break
        stabilising = any(self.masks(block) == 0 and block not in self.cached for block in self.completed)

        if every == 1:
            return self.everything()
        if commit_to > self.cached_length:
            start, self.cached_length = self.cached_length, commit_to
            return self.window(start, self.length)
        if stabilising or (every is not None and now % every == 0):
            return self.everything()
        return self.window(self.cached_length, self.length)

    # single positions

    def dkv(self) -> set[int]:
        """dKV-Cache: positions that have been decided for long enough are kept."""
        if self.is_first_or_refresh():
            return self.everything()
        now, recomputed = self.forwards + 1, set()
        for slot in range(self.length):
            since = max(self.committed.get(slot, 0), self.opened + 1)
            if self.is_undecided(slot) or now <= since + self.rules.cache_delay:
                recomputed.add(slot)
        return recomputed

    def dkv_greedy(self, about: list[int]) -> set[int]:
        """dKV-Cache-Greedy: only what has just been decided, what is about to be, and its neighbourhood."""
        if self.is_first_or_refresh():
            return self.everything()
        now, recomputed = self.forwards + 1, set()
        for slot, forward in self.committed.items():
            if now - self.rules.cache_delay <= forward <= now - 1:
                recomputed.add(slot)
        for position in about:
            before = math.ceil(self.rules.cache_window / 2)
            behind = math.floor(self.rules.cache_window / 2)
            for slot in range(position - before, position + behind + 1):
                if 0 <= slot < self.length:
                    recomputed.add(slot)
        return recomputed
