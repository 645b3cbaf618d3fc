"""What vLLM's own models take beside linear layers, by family: embeddings, the output head, or no adapters at all.

Read off the classes of vLLM 0.32 (`supports_lora`, `embedding_modules`), 0.33 has the same ones. A family that isn't here
isn't refused: vLLM has others, and runs some through transformers.
"""

from __future__ import annotations

from lorabank.formats.adapter import Adapter
from lorabank.formats.readers import MERGE, VLLM_EMBEDDING, Obstacle

NO_ADAPTERS = frozenset(
    "bloom cohere2_moe dbrx falcon falcon_mamba gemma3n_text gpt-sw3 gpt2 gptj hrm_text mamba mamba2 mimo_v2_flash stablelm "
    "zamba2".split()
)
"""transformers' `model_type` of models that vLLM runs, and refuses `--enable-lora` for."""
NO_EMBEDDINGS = frozenset(
    "afmoe axk1 deepseek_v2 deepseek_v3 ernie4_5_moe gemma gemma2 gemma3_text gemma4_text glm4 glm4_moe glm4_moe_lite gpt_oss "
    "hy_v3 laguna longcat_flash minimax_m2 ministral3 mistral olmo_hybrid olmoe opt qwen2 qwen2_moe qwen3_next".split()
)
"""Of models whose embedding and output head take no adapters there."""
NO_HEAD = NO_EMBEDDINGS | {"cohere", "cohere2"}
VLLM_HEAD = "lm_head"


def family_obstacles(adapter: Adapter, model_type: str | None) -> list[Obstacle]:
    """What vLLM would refuse of the adapter for its family; nothing where that isn't known."""
    if model_type in NO_ADAPTERS:
        return [Obstacle(what=f"vLLM takes no adapters for {model_type!r} models", way_out=MERGE)]
    found: list[Obstacle] = []
    for name, families, what in ((VLLM_EMBEDDING, NO_EMBEDDINGS, "embedding"), (VLLM_HEAD, NO_HEAD, "output head")):
        paths = tuple(path for path in adapter.layers if path.rpartition(".")[2] == name)
        if paths and model_type in families:
            found.append(Obstacle(what=f"vLLM adapts no {what} of {model_type!r} models", way_out=MERGE, layers=paths))
    return found
