"""Reinforcement learning: the engine writes, a trainer learns, and the engine takes the new weights.

Each round draws 8 texts of each puzzle and rewards those that are right. The trainer goes through them again:
`commit_steps` says what stood on the canvas when a token was chosen, and `logprobs` how probable the engine
found it. A right text among wrong ones becomes more probable, a wrong one among right ones less (GRPO,
arXiv 2402.03300), and `update_weights` swaps the weights.

pip install remask
python examples/rollouts.py
"""

from importlib.resources import as_file, files

import numpy as np
import torch
from safetensors.torch import load_file

from remask import LLM, SamplingParams
from remask.benchmarks.tiny.model import Shape, TinyTransformer
from remask.benchmarks.tiny.tasks import Sudoku
from remask.benchmarks.tiny.tokenizer import MASK_ID

ROUNDS, NUM_PUZZLES, NUM_SAMPLES, LEARNING_RATE = 8, 32, 8, 1e-4
TASK = Sudoku(size=4, box_height=2, box_width=2, pool_len=64)
PREFIX = "model.transformer."  # of LLaDA's names
SAMPLING = {
    "max_tokens": TASK.answer_len,
    "block_length": TASK.answer_len,
    "unmask": "capped_threshold:0.6",
    "temperature": 1.0,
    "rank": "top",  # confidence is that of the model, also for a token that is not its first choice
    "ignore_eos": True,  # the whole canvas comes back
    "logprobs": 1,
}


def load_trainer():
    """The tiny model with gradients."""
    model = TinyTransformer(Shape(), causal=False)
    with as_file(files("remask") / "tiny") as directory:
        stored = load_file(directory / "model.safetensors")
    model.load_state_dict({name.removeprefix(PREFIX): tensor.float() for name, tensor in stored.items()})
    return model


def replay(sample, prompt_ids):
    """The canvas before each step of a sample, and where that step has put its tokens."""
    tokens, steps = np.array(sample.token_ids), np.array(sample.commit_steps)
    for step in np.unique(steps):
        canvas = np.where(steps < step, tokens, MASK_ID)
        yield np.concatenate([prompt_ids, canvas]), tokens, steps == step


def learn(model, optimizer, outputs, rewards):
    """One step of the policy gradient.

    Returns how far the engine's log-probabilities are from the trainer's.
    """
    advantages = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-6)
    ids, tokens, chosen, weights, reported = [], [], [], [], []
    for output, own in zip(outputs, advantages, strict=True):
        for sample, advantage in zip(output.outputs, own, strict=True):
            for canvas, written, places in replay(sample, output.prompt_token_ids):
                ids.append(canvas)
                tokens.append(written)
                chosen.append(places)
                weights.append(advantage)
                reported.append(sample.logprobs)
    ids, tokens, reported = (
        torch.tensor(np.array(ids)),
        torch.tensor(np.array(tokens)),
        torch.tensor(reported),
    )
    chosen, weights = torch.tensor(np.array(chosen)), torch.tensor(np.array(weights), dtype=torch.float32)
    gap, num_tokens = 0.0, chosen.sum()
    optimizer.zero_grad()
    for part in torch.arange(len(ids)).split(256):
        logits = model(ids[part], TASK.answer_len)
        logits[..., MASK_ID] = -torch.inf
        logprobs = logits.log_softmax(-1).gather(-1, tokens[part].unsqueeze(-1)).squeeze(-1)
        found = logprobs[chosen[part]]
        gap = max(gap, (found - reported[part][chosen[part]]).abs().max().item())
        gains = weights[part].unsqueeze(1).expand_as(logprobs)[chosen[part]] * found
        (-gains.sum() / num_tokens).backward()
    optimizer.step()
    return gap


def main(rounds=ROUNDS, num_puzzles=NUM_PUZZLES):
    torch.manual_seed(0)
    rng, model = np.random.default_rng(0), load_trainer()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0)
    prompts, _ = TASK.sample(rng, num_puzzles, blanks=TASK.max_blanks)
    with LLM("tiny", dtype="float32") as llm:
        for number in range(rounds):
            sampling = SamplingParams(**SAMPLING, n=NUM_SAMPLES, seed=number)
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
            rewards = np.array(
                [[TASK.score(out.prompt, sample.text) for sample in out.outputs] for out in outputs]
            )
            gap = learn(model, optimizer, outputs, rewards)
            version = llm.update_weights(
                {PREFIX + name: tensor for name, tensor in model.state_dict().items()}
            )
            print(
                f"weights {outputs[0].weights_version}: {rewards.mean():.1%} right, "
                f"log-probabilities within {gap:.0e} of the trainer's; now weights {version}"
            )


if __name__ == "__main__":
    main()
