import pytest
import torch
from torch import nn

from analysis.routers import RouterError, find_sites

from . import tiny


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_sites_are_what_the_config_says(family: str) -> None:
    model = tiny.build(family)
    sites = find_sites(model)
    assert len(sites) == tiny.SITES.get(family, 2)
    config = model.config
    experts = next(v for n in ("n_routed_experts", "num_local_experts", "num_experts") if isinstance(v := getattr(config, n, None), int))
    assert {s.info.n_experts for s in sites} == {experts}
    assert {s.info.top_k for s in sites} == {getattr(config, "num_experts_per_tok", 1)}
    assert [s.info.index for s in sites] == list(range(len(sites)))


def test_facts_of_single_families() -> None:
    v3 = find_sites(tiny.build("deepseek_v3"))[0].info
    assert (v3.layer, v3.n_shared, v3.scoring, v3.router["topk_group"]) == (1, 1, "sigmoid", 2)
    assert len(v3.router["bias"]) == 8
    assert find_sites(tiny.build("qwen2_moe"))[0].info.n_shared == 1
    switch = find_sites(tiny.build("switch_transformers"))
    assert [s.info.stack for s in switch] == ["encoder", "decoder"]
    assert switch[0].info.native_capacity == 3


def test_no_routers_is_said_plainly() -> None:
    with pytest.raises(RouterError, match="no router layers"):
        find_sites(nn.Sequential(nn.Linear(2, 2)))


def test_dense_configuration_of_a_moe_family() -> None:
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(**tiny.FAMILIES["qwen3_moe"][1] | {"mlp_only_layers": [0, 1]})
    with pytest.raises(RouterError, match="all its layers are dense"):
        find_sites(AutoModelForCausalLM.from_config(config))


def test_nllb_is_refused_with_the_reason() -> None:
    from transformers import AutoModelForSeq2SeqLM, NllbMoeConfig

    config = NllbMoeConfig(vocab_size=60, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
                           decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_experts=4,
                           encoder_sparse_step=1, decoder_sparse_step=1)  # fmt: skip
    with pytest.raises(RouterError, match="experts 0 and 1 for every token"):
        find_sites(AutoModelForSeq2SeqLM.from_config(config))


def test_experts_without_a_router_beside_them() -> None:
    model = tiny.build("olmoe")
    block = model.model.layers[0].mlp
    block.gate_moved, block.gate = nn.Identity(), nn.Identity()
    with pytest.raises(RouterError, match="0 routers beside them.*Identity"):
        find_sites(model)


def test_compiled_model_is_refused() -> None:
    with pytest.raises(RouterError, match="compiled"):
        find_sites(torch.compile(tiny.build("olmoe"), backend="eager"))
