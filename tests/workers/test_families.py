"""Model families: real configurations, what is refused, and families of other packages."""

from __future__ import annotations

import json
import re
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

from remask import LLM, InvalidRequest
from remask.workers.models.denoiser import load_denoiser
from remask.workers.models.families import OTHERS, Family, dream, llada, llada_moe, load
from remask.workers.models.loading import destinations, read_config
from remask.workers.models.transformer import Transformer

MOE_TINY = Path(__file__).parents[1] / "data" / "golden" / "lladamoe-tiny"
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


@pytest.mark.parametrize(
    "own",
    [{}, {"bos_token_id": 151643, "pad_token_id": 151643}],
    ids=["Dream-7B", "DiffuCoder-7B"],
)
def test_dream_7b_has_its_339_tensors_and_7_6_billion_parameters(own: dict[str, Any]) -> None:
    config = dream.parse_config({**DREAM_7B, **own}, "config.json")
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


LLADA_MOE = {
    "architectures": ["LLaDAMoEModelLM"],
    "model_type": "llada",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "expert_intermediate_size": 1024,
    "dense_intermediate_size": 8192,
    "moe_layer_freq": [1] * 16,
    "shared_expert_intermediate_size": None,
    "vocab_size": 157184,
    "tie_word_embeddings": False,
    "qk_layernorm": True,
    "rope_theta": 50000,
    "max_position_embeddings": 8192,
    "partial_rotary_factor": 1,
    "rope_scaling": None,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "norm_topk_prob": None,
    "mask_token_id": 156895,
    "eos_token_id": 156892,
}


def test_llada_moe_7b_has_its_3219_tensors_and_7_4_billion_parameters() -> None:
    config = llada_moe.parse_config(LLADA_MOE, "config.json")
    model = Transformer(config)
    places = destinations(model, llada_moe.tensor_names(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in places.items()}
    assert len(shapes) == 3219
    first = "model.layers.15."
    assert shapes[f"{first}self_attn.q_norm.weight"] == (128,)
    assert shapes[f"{first}mlp.gate.weight"] == (64, 2048)
    assert shapes[f"{first}mlp.experts.63.up_proj.weight"] == (1024, 2048)
    assert shapes[f"{first}mlp.experts.63.down_proj.weight"] == (2048, 1024)
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert count == sum(parameter.numel() for parameter in model.parameters()) == 7_356_880_896
    with_shared = {**LLADA_MOE, "shared_expert_intermediate_size": 512}
    assert len(llada_moe.tensor_names(llada_moe.parse_config(with_shared, "config.json"))) == 3219 + 48


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_experts_per_tok": 65}, "num_experts_per_tok 65 is above num_experts 64"),
        ({"moe_layer_freq": [1] * 15 + [0]}, "'moe_layer_freq' must be 1 for each of the 16 layers"),
        ({"moe_layer_freq": [1]}, "'moe_layer_freq' must be 1 for each of the 16 layers"),
        ({"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias = True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": {"factor": 2.0}}, "this LLaDA-MoE variant is not supported: rope_scaling"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"rope_theta": None}, "'rope_theta' must be a positive number"),
        ({"num_experts": None}, "'num_experts' must be a positive integer"),
    ],
)
def test_what_llada_moe_does_not_have_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        llada_moe.parse_config({**LLADA_MOE, **changes}, "config.json")
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", {"added_tokens": [{"id": 155, "content": "<|mask|>"}]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"155": {"content": "<|mask|>"}}}),
    ],
)
def test_a_mask_id_that_the_config_lacks_is_the_tokenizers(
    tmp_path: Path, name: str, content: dict[str, Any]
) -> None:
    config = json.loads((MOE_TINY / "config.json").read_text())
    del config["mask_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidRequest, match="'mask_token_id' must be an id below 160, not None"):
        read_config(tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    assert read_config(tmp_path)[1].mask_id == 155


def test_experts_are_not_quantized() -> None:
    with pytest.raises(InvalidRequest, match="quantization: is not supported for experts"):
        load_denoiser(MOE_TINY, dtype="bfloat16", device="cpu", quantization="fp8")


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


@pytest.mark.parametrize(
    ("architecture", "problem"),
    [
        ("LLaDA2MoeModelLM", "'LLaDA2MoeModelLM' is LLaDA2.x, which is not supported: its blocks attend to"),
        ("SDARForCausalLM", "is SDAR, which is not supported: its blocks"),
        ("SDARMoeForCausalLM", "is SDAR, which"),
        ("Fast_dLLM_QwenForCausalLM", "is Fast-dLLM v2, which is not supported: its blocks"),
        ("DiffusionGemmaForBlockDiffusion", "is DiffusionGemma, which is not supported: a causal encoder"),
        ("LlamaForCausalLM", "is by its name an autoregressive model, which is not supported: tokens"),
        ("NewModel", "architecture 'NewModel' is not supported"),
        (None, "architecture None is not supported"),
    ],
)
def test_another_model_is_named_as_what_it_is(tmp_path: Path, architecture: str | None, problem: str) -> None:
    """Before any weights are read: there are none."""
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": [architecture] if architecture else []})
    )
    with pytest.raises(InvalidRequest) as caught:
        LLM(tmp_path)
    assert problem in str(caught.value)
    assert "supported: LLaDAModelLM, DreamModel, LLaDAMoEModelLM" in str(caught.value)


def test_no_family_claims_an_architecture_that_is_refused() -> None:
    for architecture in load([]):
        assert not any(re.search(pattern, architecture) for pattern, _, _ in OTHERS), architecture
