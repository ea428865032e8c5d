"""The reference executor on SmolLM2 against Transformers' logits (``tests/golden/make_logits.py``)."""

from __future__ import annotations

import numpy as np

from pi2rt.executors.reference.executor import ReferenceExecutor
from tests.golden.compare import compare_logits, load_greedy, load_logits
from tests.support.real_model import smollm2
from tests.support.running import all_logits, greedy, opened


async def test_smollm2_is_what_transformers_computes() -> None:
    """A part of the text, and of one continuation; numpy takes its time."""
    path = smollm2()
    golden = load_logits().chunks()[0][:96]
    async with opened(ReferenceExecutor(), path, slots=2, context=256) as executor:
        report = compare_logits(await all_logits(executor, golden.tokens, context=256), golden)
        text = load_greedy()[1]
        prompt = np.array(text.prompt_tokens, np.int32)
        tokens = await greedy(executor, prompt, 8, slot=1, context=256)
    assert report.positions == 96
    assert report.relative_error < 1e-4
    assert report.worst_position < 1e-4
    assert report.top1_agreement == 1.0
    assert abs(report.perplexity_ratio) < 1e-4
    assert tokens == text.tokens[:8]
