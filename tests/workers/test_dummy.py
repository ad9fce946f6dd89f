"""Random weights: the same every time, for every dtype, and spread out so that policies have to decide."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from remask import LLM, InvalidRequest, SamplingParams
from remask.workers.models.denoiser import load_denoiser
from remask.workers.models.dummy import dummy_model

MODELS = Path(__file__).parents[2] / "benchmarks" / "models"


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    """A directory that holds a config and nothing else."""
    config = json.loads((MODELS / "llada-124m" / "config.json").read_text())
    config |= {"d_model": 256, "n_heads": 4, "n_kv_heads": 4, "n_layers": 4, "mlp_hidden_size": 576}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_weights_are_the_same_every_time_and_in_every_dtype(shape: Path) -> None:
    torch.manual_seed(1)
    first = dummy_model(shape)
    torch.manual_seed(2)
    second, rounded = dummy_model(shape), dummy_model(shape, dtype="bfloat16")
    names = [name for name, _ in first.named_parameters()]
    assert len(names) == 3 + 4 * 6
    for a, b, c in zip(first.parameters(), second.parameters(), rounded.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.bfloat16(), c)


def test_the_benchmarks_model_has_124_million_parameters() -> None:
    model = dummy_model(MODELS / "llada-124m", dtype="bfloat16")
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_373_760


def test_probabilities_are_spread_out(shape: Path) -> None:
    """Confidences at commit under a policy that does not choose by confidence."""
    prompts = torch.randint(3, 31000, (4, 40), generator=torch.Generator().manual_seed(0)).tolist()
    with LLM(shape, load_format="dummy", device="cpu", max_num_rows=512) as llm:
        outputs = llm.generate(
            prompts, SamplingParams(max_tokens=32, unmask="schedule:score=random", seed=0, ignore_eos=True)
        )
    samples = [output.outputs[0] for output in outputs]
    found = torch.tensor([c for sample in samples for c in sample.confidences])
    low, median, high = found.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    assert low < 0.6 < high
    assert 0.5 < median < 0.95
    assert 0.2 < float((found >= 0.9).float().mean()) < 0.8
    assert len({token for sample in samples for token in sample.token_ids}) > 16, "positions differ"


def test_text_needs_a_tokenizer_and_ids_do_not(shape: Path) -> None:
    with LLM(shape, load_format="dummy", device="cpu", max_num_rows=512) as llm:
        (output,) = llm.generate([5, 6, 7], SamplingParams(max_tokens=4, ignore_eos=True))
        assert output.outputs[0].text is None
        assert len(output.outputs[0].token_ids) == 4
        with pytest.raises(InvalidRequest, match="no tokenizer; give token ids"):
            llm.generate("text")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"load_format": "safetensors"}, r"load_format: .*use 'auto' or 'dummy'"),
        ({"load_format": None}, "load_format"),
        ({"load_format": "auto"}, r"model: .*model\.safetensors"),
        ({"load_format": "dummy", "dtype": "int8"}, "dtype"),
    ],
)
def test_what_cannot_be_loaded_is_refused_by_name(shape: Path, arguments: dict, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        LLM(shape, **arguments)


def test_a_shape_must_be_a_directory_with_a_config(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InvalidRequest, match=r"model: (holds no config|is not a directory)"):
            load_denoiser(directory, device="cpu", load_format="dummy")
