"""Numbers in a range as languages: every number with so many decimals, written in the usual way, and no other text."""

from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from .languages import Either, Language, Sequence, literal, sequence, span


def numbers(least: Decimal, most: Decimal, decimals: int = 0) -> Language:
    """Numbers from `least` to `most`, both included, with up to `decimals` digits behind the point.

    No leading zeros, no exponent, no -0; no text at all where the range holds no such number.
    """
    found: list[Language] = []
    for digits in range(decimals + 1):
        unit = Decimal(1).scaleb(-digits)
        low = int((least / unit).to_integral_value(ROUND_CEILING))
        high = int((most / unit).to_integral_value(ROUND_FLOOR))
        if high >= 0:
            found += _scaled(max(low, 0), high, digits)
        if low < 0:
            found += [sequence(literal("-"), part) for part in _scaled(max(-high, 1), -low, digits)]
    return Either(tuple(found))


def _scaled(low: int, high: int, digits: int) -> list[Language]:
    """Integers from `low` to `high` as decimals, the last `digits` digits behind the point; a part for each width."""
    parts = []
    for width in range(digits + 1, max(len(str(high)), digits + 1) + 1):
        first = low if width == digits + 1 else max(low, 10 ** (width - 1))
        last = min(high, 10**width - 1)
        if first <= last:
            parts.append(_between(f"{first:0{width}d}", f"{last:0{width}d}", digits))
    return parts


def _between(low: str, high: str, digits: int) -> Language:
    """Strings of digits from `low` to `high`, of one width, with a point before the last `digits`."""
    if not low:
        return Sequence(())
    behind = len(low) - 1
    point = [literal(".")] if behind + 1 == digits else []

    def digit(first: str, last: str) -> Language:
        return span(ord(first), ord(last))

    if set(low) == {"0"} and set(high) == {"9"}:  # all of them, or the parts below would double with each digit
        return sequence(*point, digit("0", "9"), _between(low[1:], high[1:], digits))
    if low[0] == high[0]:
        return sequence(*point, digit(low[0], low[0]), _between(low[1:], high[1:], digits))
    least, most = "0" * behind, "9" * behind
    parts = [
        sequence(digit(low[0], low[0]), _between(low[1:], most, digits)),
        sequence(digit(high[0], high[0]), _between(least, high[1:], digits)),
    ]
    if ord(high[0]) - ord(low[0]) > 1:
        inner = digit(chr(ord(low[0]) + 1), chr(ord(high[0]) - 1))
        parts.append(sequence(inner, _between(least, most, digits)))
    return sequence(*point, Either(tuple(parts)))
