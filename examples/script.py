"""A plain script: stream an answer, then ask again with the conversation so far."""

import pi2rt

with pi2rt.Engine("smollm2") as engine:
    messages = [{"role": "user", "content": "Name three primary colours."}]
    answer = ""
    for chunk in engine.stream(messages, max_tokens=100):
        answer += chunk.text
        print(chunk.text, end="", flush=True)
    print()

    # The prefix of the conversation is in the cache already: only what is new is computed.
    messages += [
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And which is the warmest?"},
    ]
    completion = engine.generate(messages, max_tokens=100)
    print(completion.text)
    print(f"{completion.timing.cached_tokens} of {completion.timing.prompt_tokens} prompt tokens were cached")
