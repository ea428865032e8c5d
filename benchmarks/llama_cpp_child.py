"""llama.cpp's half of ``against_llama_cpp.py``: obeys one JSON command a line, answers with one JSON line.

Times are of evaluation alone (llama_decode), without sampling or text, which favours llama.cpp. Needs nothing but
llama-cpp-python, so that it can run in an environment of its own.
"""

from __future__ import annotations

import ctypes
import json
import random
import sys
import time
from typing import Any

import llama_cpp


class Model:
    def __init__(self, path: str, threads: int, context: int, sequences: int, mapped: bool) -> None:
        """``mapped``: weights stay in the mapped file; else llama.cpp copies some into a faster layout."""
        llama_cpp.llama_backend_init()
        silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
        self._silent = silent  # called for as long as the library lives
        start = time.perf_counter()
        settings = llama_cpp.llama_model_default_params()
        settings.use_extra_bufts = not mapped
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
        self.load_s = time.perf_counter() - start
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = context, 512, 512, sequences
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)
        self.random = random.Random(0)
        self.kept = (0, 0)  # context and sequences that are in the cache

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """rows: (token, position, sequence, wants logits)"""
        b = self.batch
        b.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = token, position, 1, wanted
            b.seq_id[i][0] = sequence
        if llama_cpp.llama_decode(self.context, b):
            raise RuntimeError("llama_decode failed")
        llama_cpp.llama_synchronize(self.context)

    def token(self) -> int:
        return self.random.randrange(300, self.vocab - 300)

    def prefill(self, count: int, sequence: int = 0) -> float:
        """Seconds."""
        seconds = 0.0
        for start in range(0, count, 512):
            end = min(count, start + 512)
            rows = [(self.token(), p, sequence, p == count - 1) for p in range(start, end)]
            begin = time.perf_counter()
            self.decode(rows)
            seconds += time.perf_counter() - begin
        return seconds

    def run(self, command: dict[str, Any]) -> dict[str, float]:
        if command["what"] == "prefill":
            self.clear()
            self.kept = (0, 0)
            return {"tokens_per_s": command["tokens"] / self.prefill(command["tokens"])}
        sequences = command.get("sequences", 1)
        if self.kept == (command["context"], sequences):  # only what was decoded goes
            memory = llama_cpp.llama_get_memory(self.context)
            for s in range(sequences):
                llama_cpp.llama_memory_seq_rm(memory, s, command["context"], -1)
        else:
            self.clear()
            for s in range(sequences):
                self.prefill(command["context"], s)
            self.kept = (command["context"], sequences)
        begin = time.perf_counter()
        for i in range(command["tokens"]):
            self.decode([(self.token(), command["context"] + i, s, True) for s in range(sequences)])
        return {"tokens_per_s": sequences * command["tokens"] / (time.perf_counter() - begin)}


def main() -> None:
    path, threads, context, sequences = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    model = Model(path, threads, context, sequences, sys.argv[5:] == ["mapped"])
    print(json.dumps({"load_s": model.load_s, "version": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(model.run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
