"""What leaves the decoding loop: finished rows, their counts, streamed text, and rows that a criterion stops."""

import torch

from .call import Call, Counts, Ended
from .decoding import State, first_true, stop_position
from .scoring import NOT_FINITE, NOTHING_LEFT


class Ledger:
    """Collects the rows at work, each at a place of its own, as they end. S places, N positions to decide.

    A place is free again when the call is over that its row came with.

    Args:
        call: the first to take rows in.
        state: of its rows, before the first forward; they have the first places.
    """

    def __init__(self, call: Call, state: State):
        self.stop_ids = call.stop_ids
        self.calls: list[Call] = []
        self.tokens = state.tokens.clone()
        self.step_map = state.step_map.clone()
        self.unsettled = state.unsettled.clone()
        self.may_stop = call.canvas.may_stop.clone()
        self.width = torch.full_like(state.length, call.width)
        self.length = state.length.clamp_max(call.width)  # of the row, fewer where a criterion ends it
        self.counts = Counts(*(torch.zeros_like(state.rows) for _ in range(6)))
        self._owner: dict[int, tuple[Call, int]] = {}

    def take(self, call: Call, places: list[int]) -> None:
        """Takes in the rows of a call, at these places."""
        self.calls.append(call)
        self._owner |= {place: (call, row) for row, place in enumerate(places)}
        call.begin(places)

    def admit(self, call: Call, columns: int) -> list[int]:
        """Books a further call, whose answers and all others have so many columns; returns the places of its rows."""
        # 1. The first free places, and room for them
        count, candidate = call.canvas.batch, 0
        places: list[int] = []
        while len(places) < count:
            if candidate not in self._owner:
                places.append(candidate)
            candidate += 1
        more = max(0, places[-1] + 1 - len(self.tokens))
        further = columns - self.tokens.shape[1]
        pad = torch.nn.functional.pad
        for name in ("tokens", "step_map", "unsettled", "may_stop"):
            setattr(self, name, pad(getattr(self, name), (0, further, 0, more)))
        for name in ("width", "length"):
            setattr(self, name, pad(getattr(self, name), (0, more)))
        self.counts = Counts(**{name: pad(table, (0, more)) for name, table in vars(self.counts).items()})

        # 2. Nothing of whoever had them before
        at = torch.tensor(places, device=self.tokens.device)
        own = call.canvas.slots < call.canvas.length
        given = own.shape[1]
        self.tokens[at], self.step_map[at], self.unsettled[at] = call.canvas.mask_token_id, -1, False
        self.may_stop[at] = pad(call.canvas.may_stop, (0, columns - given))
        self.width[at] = call.width
        self.length[at] = own.sum(1).clamp_max(call.width)
        for table in vars(self.counts).values():
            table[at] = 0
        self.take(call, places)
        return places

    def leave(
        self, state: State, done: torch.Tensor, filled: torch.Tensor, further: torch.Tensor, broken: torch.Tensor
    ) -> torch.Tensor | None:
        """Books a forward and takes out the rows that ended in it.

        A call whose logits are not finite, or without any token left for a position, fails with a `ValueError` that
        names the row of the batch and the forward; so does one whose criterion or streamer raises, with what it
        raised.

        Args:
            done, filled (`(B,)` bool): finished rows; rows with undecided positions before the fill behind a stop
                token.
            further (`(B,)` long): forwards that the reference makes beside this one.
            broken (`(B,)` long): what is wrong with the logits of a row, as in [`Scores`].

        Returns:
            `(B',)` indices of the rows that go on, `None` where all do.
        """
        # 1. What the forward brought
        self.tokens[state.rows], self.step_map[state.rows] = state.tokens, state.step_map
        open_ended = state.unsettled | state.held[:, None]
        self.unsettled[state.rows] = open_ended & ~done[:, None]  # nothing changes in a row that has ended
        self.length[state.rows] = torch.minimum(state.length, self.width[state.rows])
        self.counts.extent[state.rows] = state.length
        self.counts.revoked[state.rows] = state.revoked
        flags, wrong, places = torch.stack([done.long(), broken.long(), state.rows]).tolist()  # a host sync
        if any(wrong):
            forwards = state.forward.tolist()
            owners = [self._owner[place] for place in places]
            self._fail_broken(list(zip(owners, wrong, forwards, strict=True)))
        self.counts.forwards[state.rows] = state.forward
        self.counts.reference[state.rows] += 1 + further + (filled & done).long()

        # 2. Criteria and streams
        ended = {place for place, flag in zip(places, flags, strict=True) if flag}
        at_work = [call for call in self.calls if call.error is None]
        if any(call.criteria or call.stream is not None for call in at_work):
            ended |= self._advance(at_work, places, ended)

        # 3. Rows whose call has failed leave, and calls without rows are over
        ended |= {place for place in places if self._owner[place][0].error is not None}
        if not ended:
            return None
        keep = [index for index, place in enumerate(places) if place not in ended]
        self._release(places, ended)
        return torch.tensor(keep, dtype=torch.long, device=done.device)

    def _fail_broken(self, found: list[tuple[tuple[Call, int], int, int]]) -> None:
        """Ends the calls of rows with broken logits: `((call, row), what is wrong, forwards)` each."""
        for wanted in (NOT_FINITE, NOTHING_LEFT):
            for (call, row), wrong, forward in found:
                if wrong != wanted or call.error is not None:
                    continue
                if wrong == NOT_FINITE:
                    message = (
                        f"The model's logits must be finite (got NaN or inf for row {row} of the batch in forward "
                        f"{forward}). {_way_out(call.suspects)}; other rows are not at fault."
                    )
                else:
                    message = (
                        f"The constraints must leave a token for every position (got none for row {row} of the batch "
                        f"in forward {forward}). Relax `bad_words_ids`, `no_repeat_ngram_size`, `suppress_tokens`, "
                        "the minimum length or your `logits_processor`."
                    )
                call.fail(ValueError(message))

    def _advance(self, calls: list[Call], places: list[int], ended: set[int]) -> set[int]:
        """Follows the decided prefixes of calls; returns the places of the rows that a criterion ends.

        What may still change is not decided: nobody is shown a token that turns out to be another one.
        """
        decided = (self.step_map > 0) & ~self.unsettled
        stop = stop_position(self.tokens, decided & self.may_stop, self.stop_ids)
        ends = torch.minimum(torch.minimum(first_true(~decided), stop + 1), self.width).tolist()
        limits = torch.minimum(stop + 1, self.length).tolist()
        extents = self.counts.extent.tolist()
        rows_of: dict[Call, list[int]] = {call: [] for call in calls}
        for place in places:
            call, row = self._owner[place]
            if call in rows_of:
                rows_of[call].append(row)
        stopped: set[int] = set()
        for call, rows in rows_of.items():
            if not (rows and (call.criteria or call.stream is not None)):
                continue
            at = call.places
            try:
                found, lengths = call.follow(
                    self.tokens[at, : call.canvas.slots.shape[1]],
                    rows,
                    [ends[place] for place in at],
                    [limits[place] for place in at],
                    [extents[place] for place in at],
                )
                for row in found:
                    self.length[at[row]] = lengths[row]
                stopped |= {at[row] for row in found}
                call.close_step([row for row in rows if row in found or at[row] in ended])
            except Exception as error:  # of a criterion or a streamer, which are the call's own
                call.fail(error)
        return stopped

    def _release(self, places: list[int], ended: set[int]) -> None:
        """Takes rows out of their calls; a call that has none at work any more is over."""
        for place in places:
            call = self._owner[place][0]
            if place in ended and call.error is None:
                call.left -= 1
        for call in [call for call in self.calls if not call.left]:
            self.calls.remove(call)
            for place in call.places:
                del self._owner[place]
            if call.error is None:
                call.end(self._ended(call))

    def _ended(self, call: Call) -> Ended:
        at, columns = call.places, call.canvas.slots.shape[1]
        counts = Counts(**{name: table[at] for name, table in vars(self.counts).items()})
        return Ended(self.tokens[at, :columns], self.step_map[at, :columns], self.length[at], counts)

    def drop(self, call: Call, error: Exception) -> None:
        """Ends a call before its time, because of `error`."""
        call.fail(error)
        self._release([], set())


def _way_out(suspects: dict[str, float]) -> str:
    named = ", ".join(f"{name}={value:g}" for name, value in suspects.items())
    return f"Lower {named}, or check the weights and the dtype" if named else "Check the weights and the dtype"


__all__ = ["Ledger"]
