"""dlmserve (https://pypi.org/project/dlmserve), versions 0.1: LLaDA in bf16, texts only.

dlmserve commits a constant number of tokens a step, so that only schedules can be compared. A request with
another policy is sent as a schedule of one token a step.
"""

from typing import Any

from protocol import Answers, serve  # type: ignore[import-not-found]


def load(model: str) -> tuple[str, Answers]:
    import torch
    from dlmserve.engine import Engine  # type: ignore[import-not-found]
    from dlmserve.sampler import SamplingParams  # type: ignore[import-not-found]

    engine = Engine(model, dtype="bf16", device="cuda" if torch.cuda.is_available() else "cpu")
    eos = engine.tokenizer.eos_token_id

    def answer(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = [{}] * len(requests)
        kinds: dict[tuple[int, int, int], list[int]] = {}
        for place, asked in enumerate(requests):
            if asked["text"] is None:
                raise ValueError("it takes texts, and this workload is made of ids")
            length = asked["max_tokens"]
            kinds.setdefault((length, asked["block_length"], asked["steps"] or length), []).append(place)
        for (length, block_length, steps), places in kinds.items():
            params = SamplingParams(num_denoising_steps=steps, gen_length=length, block_length=block_length)
            texts = [requests[place]["text"] for place in places]
            for place, output in zip(places, engine.generate(texts, params, prerendered=True), strict=True):
                ids = output.output_ids.tolist()
                num_tokens = ids.index(eos) if eos in ids else len(ids)
                results[place] = {"text": output.text, "num_tokens": num_tokens, "nfe": steps}
        return results

    return "dlmserve", answer


if __name__ == "__main__":
    serve(load)
