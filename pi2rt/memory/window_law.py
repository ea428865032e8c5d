"""How many KV pages need memory for their windowed bytes, so that no step ever waits for it.

A sequence of which c positions are computed and s submitted (f = s - c rows in flight) holds the windowed bytes of the
pages of its positions [c - W + 1, s), W the window: position c sees the first of them, later ones see later ones, and
what is before is let go (``WindowPool.first``). These are W - 1 + f positions, and n consecutive positions lie in at
most 1 + ceil((n - 1) / P) pages of P = 64, which they do where the first of them is the last position of a page. So

    pages of one sequence <= 1 + ceil((W - 2 + f) / P).

Without rows in flight that is 1 + q, q = ceil((W - 2) / P). The first q P - (W - 2) + 1 rows, which are at most P, make
it one more, and every P rows behind these another one. All sequences together have F rows in flight at most, which make
the most pages where each sequence has its first ones before any has more: N (1 + q) pages, and so many more as
``least_window_pages`` counts. Pages that sequences share count once, so that sharing needs fewer; and no sequence has
more pages than its context. F is what the lanes' steps carry at once (``engine.lane.rows_in_flight``).

A sequence that has ended, or that was preempted, counts as one that runs until its last step has returned; what its
steps have returned is let go as that of a live one. One that resumes behind a lost executor lets go of what lies behind
its computed positions. So f is never more than what is in flight.
"""

from __future__ import annotations

from pi2rt.models.states import PAGE_TOKENS


def least_window_pages(
    window: int, sequences: int, rows: int, context: int, page_tokens: int = PAGE_TOKENS
) -> int:
    """Pages whose windowed bytes ``sequences`` of at most ``context`` positions hold at once, with ``rows`` rows in
    flight together, at most."""
    seen = window - 2
    quotient = -(-seen // page_tokens)
    first = quotient * page_tokens - seen + 1
    grown = min(sequences, rows // first)  # sequences that have their first ones
    more = grown + (rows - grown * first) // page_tokens
    return min(sequences * (1 + quotient) + more, sequences * -(-context // page_tokens))


def window_pages(window: int, sequences: int, rows: int, context: int) -> int:
    """``least_window_pages``, and for reuse the window of one more conversation for each sequence: that of the turn
    before, behind which the next one begins."""
    reuse = sequences * -(-(window - 1) // PAGE_TOKENS)
    return least_window_pages(window, sequences, rows, context) + reuse
