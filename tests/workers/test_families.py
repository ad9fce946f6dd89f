"""Model families: real configurations, what is refused, and families of other packages."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

from remask import InvalidRequest
from remask.workers.models.families import Family, dream, llada, load
from remask.workers.models.loading import destinations
from remask.workers.models.transformer import Transformer

DREAM_7B = {
    "architectures": ["DreamModel"],
    "model_type": "Dream",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": None,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 28,
    "use_mrope": False,
    "mask_token_id": 151666,
    "eos_token_id": 151643,
    "torch_dtype": "bfloat16",
}


def test_dream_7b_has_its_339_tensors_and_7_6_billion_parameters() -> None:
    config = dream.parse_config(DREAM_7B, "config.json")
    with torch.device("meta"):
        model = Transformer(config)
    places = destinations(model, dream.tensor_names(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in places.items()}
    assert len(shapes) == 339
    layer = {
        name.removeprefix("model.layers.27."): shape
        for name, shape in shapes.items()
        if name.startswith("model.layers.27.")
    }
    assert layer == {
        "input_layernorm.weight": (3584,),
        "post_attention_layernorm.weight": (3584,),
        "self_attn.q_proj.weight": (3584, 3584),
        "self_attn.q_proj.bias": (3584,),
        "self_attn.k_proj.weight": (512, 3584),
        "self_attn.k_proj.bias": (512,),
        "self_attn.v_proj.weight": (512, 3584),
        "self_attn.v_proj.bias": (512,),
        "self_attn.o_proj.weight": (3584, 3584),
        "mlp.gate_proj.weight": (18944, 3584),
        "mlp.up_proj.weight": (18944, 3584),
        "mlp.down_proj.weight": (3584, 18944),
    }
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert count == sum(parameter.numel() for parameter in model.parameters()) == 7_615_616_512
    assert (config.mask_id, config.eos_ids, config.max_len, config.shift) == (151666, (151643,), 2048, 1)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "this Dream variant is not supported: rope_scaling",
        ),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"use_mrope": True}, "use_mrope = True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"num_key_value_heads": 3}, "do not make even heads"),
        ({"rope_theta": None}, "'rope_theta' must be a positive number"),
        ({"num_hidden_layers": None}, "'num_hidden_layers' must be a positive integer"),
        ({"mask_token_id": None}, "'mask_token_id' must be an id below"),
        ({"mask_token_id": 151643}, "must be one id that does not end a text"),
        ({"tie_word_embeddings": "no"}, "must be true or false"),
    ],
)
def test_what_dream_does_not_have_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        dream.parse_config({**DREAM_7B, **changes}, "config.json")
    assert problem in str(caught.value)


OWN = Family(
    name="Own",
    architectures=("OwnModel",),
    parse_config=llada.parse_config,
    tensor_names=llada.tensor_names,
    embedding=llada.EMBEDDING,
    head=llada.HEAD,
)
TAKEN = Family(**{**vars(OWN), "architectures": ("DreamModel",)})
NOT_A_FAMILY = 5


def test_a_package_adds_a_family(caplog: pytest.LogCaptureFixture) -> None:
    def entry(name: str) -> EntryPoint:
        return EntryPoint(name, f"{__name__}:{name}", "remask.models")

    class Loaded:
        def __init__(self, name: str, value: Any) -> None:
            self.name, self._value = name, value

        def load(self) -> Any:
            return self._value

    found = load([Loaded("own", OWN), Loaded("taken", TAKEN), Loaded("none", NOT_A_FAMILY), entry("missing")])  # type: ignore[list-item]
    assert found["OwnModel"] is OWN
    assert found["DreamModel"] is dream.FAMILY
    assert [record.args[0] for record in caplog.records if record.args] == ["taken", "none", "missing"]  # type: ignore[index]


def test_an_unknown_architecture_lists_the_known_ones(tmp_path: Path) -> None:
    from remask.workers.models.loading import read_config

    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(InvalidRequest, match="supported: LLaDAModelLM, DreamModel"):
        read_config(tmp_path)
