"""MobiLlama for `transformers`: LLaMA whose layers all use one FFN (arXiv 2402.16840, section 3.2).

This file travels with the exported weights (`trust_remote_code=True` loads it from there) and needs nothing but torch
and transformers.
"""

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaMLP


class MobiLlamaConfig(LlamaConfig):
    model_type = "mobillama"


class MobiLlamaModel(LlamaModel):
    config_class = MobiLlamaConfig

    def __init__(self, config: MobiLlamaConfig) -> None:
        super().__init__(config)
        self.ffn = LlamaMLP(config)
        for layer in self.layers:
            del layer.mlp
            # A plain attribute, not a submodule: the weights have one name, `model.ffn`, and one copy in a file.
            layer.__dict__["mlp"] = self.ffn
        self.post_init()


class MobiLlamaForCausalLM(LlamaForCausalLM):
    config_class = MobiLlamaConfig

    def __init__(self, config: MobiLlamaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = MobiLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
