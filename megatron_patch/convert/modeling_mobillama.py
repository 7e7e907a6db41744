"""MobiLlama for `transformers`: LLaMA whose layers all use one FFN (arXiv 2402.16840, section 3.2), or one of several.

`ffn_of_layer` of config.json, where it is there, lists which FFN each layer uses, from 0: they are `model.ffns.K` then.

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
        table = getattr(config, "ffn_of_layer", None)
        if table is None:
            self.ffn = LlamaMLP(config)
            used = [self.ffn] * len(self.layers)
        else:
            self.ffns = nn.ModuleList(LlamaMLP(config) for _ in range(max(table) + 1))
            used = [self.ffns[k] for k in table]
        for layer, ffn in zip(self.layers, used, strict=True):
            del layer.mlp
            # A plain attribute, not a submodule: the weights have one name, `model.ffn`, and one copy in a file.
            layer.__dict__["mlp"] = ffn
        self.post_init()


class MobiLlamaForCausalLM(LlamaForCausalLM):
    config_class = MobiLlamaConfig

    def __init__(self, config: MobiLlamaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = MobiLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
