"""A streamer that remembers."""


class Listener:
    """Keeps what a streamer is told, row by row."""

    supports_batch = True

    def __init__(self, mask_token_id: int):
        self.mask_token_id = mask_token_id
        self.tokens, self.drafts, self.replaced = {}, {}, 0

    def put(self, value, row=None):
        if row is not None:
            self.tokens.setdefault(row, []).extend(value.tolist())

    def put_draft(self, value, row=None):
        """Counts the tokens of earlier drafts that are other ones now."""
        start, before = len(self.tokens.get(row, [])), self.drafts.get(row, {})
        now = {start + index: token for index, token in enumerate(value.tolist()) if token != self.mask_token_id}
        self.replaced += sum(now.get(place, token) != token for place, token in before.items())
        self.drafts[row] = now

    def end(self):
        pass
