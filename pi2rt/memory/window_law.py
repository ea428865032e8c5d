"""How many KV pages need memory for their windowed bytes, so that no step ever waits for it.

A sequence of which c positions are computed and s submitted (f = s - c rows in flight) holds the windowed bytes of the
pages of its positions [c - W + 1, s), W the window: position c sees the first of them, later ones see later ones, and
before that its pages are let go (``WindowPool.first``). These are W - 1 + f positions, and n consecutive positions lie
in at most ceil((n - 1) / P) + 1 pages of P = 64. So

    pages of one sequence <= 1 + ceil((W - 2 + f) / P) <= 1 + (W - 2 + f + P - 1) / P = (W + 2 P - 3 + f) / P

and of N sequences with F rows in flight together

    pages <= (N (W + 2 P - 3) + F) / P,

of which the whole part counts. It is reached where each window begins with the last position of a page and the rows in
flight end with the first one of a page. Pages that sequences share count once, so that sharing needs fewer. Also no
sequence has more pages than its context. F is what the lanes' steps carry at once (``engine.lane.rows_in_flight``).

A sequence that has ended, or that was preempted, counts as one that runs until its last step has returned; what its
steps have returned is let go as those of a live one. One that resumes behind a lost executor lets go of what lies
behind its computed positions. So f is never more than what is in flight.
"""

from __future__ import annotations

from pi2rt.models.states import PAGE_TOKENS


def least_window_pages(
    window: int, sequences: int, rows: int, context: int, page_tokens: int = PAGE_TOKENS
) -> int:
    """Pages whose windowed bytes ``sequences`` of at most ``context`` positions hold at once, with ``rows`` rows in
    flight together, at most."""
    held = (sequences * (window + 2 * page_tokens - 3) + rows) // page_tokens
    return max(1, min(held, sequences * -(-context // page_tokens)))


def window_pages(window: int, sequences: int, rows: int, context: int) -> int:
    """``least_window_pages``, and for reuse the window of one more conversation for each sequence: that of the turn
    before, behind which the next one begins."""
    reuse = sequences * -(-(window - 1) // PAGE_TOKENS)
    return least_window_pages(window, sequences, rows, context) + reuse
