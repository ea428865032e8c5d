"""llama.cpp's perplexity of a text, by the method of its own tool, to hold beside ``pi2rt perplexity``.

    peer/bin/python benchmarks/llama_cpp_perplexity.py MODEL.gguf tests/golden/text.txt --chunk 256

Chunks of N tokens that know nothing of each other; the second half of each is scored. Needs llama-cpp-python and numpy.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import llama_cpp
import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--chunk", type=int, default=512)
    options = parser.parse_args()
    n = options.chunk
    model = llama_cpp.Llama(options.model, n_ctx=n, n_batch=n, logits_all=True, verbose=False)
    tokens = model.tokenize(options.text.read_bytes(), add_bos=True)
    total, count = 0.0, 0
    for start in range(0, len(tokens) - n + 1, n):
        chunk = tokens[start : start + n]
        model.reset()
        model.eval(chunk)
        logits = np.asarray(model.scores[:n], np.float64)
        for i in range(n // 2, n - 1):
            row = logits[i] - logits[i].max()
            total -= row[chunk[i + 1]] - math.log(np.exp(row).sum())
            count += 1
    print(json.dumps({"perplexity": math.exp(total / count), "tokens": count}))


if __name__ == "__main__":
    main()
