"""
How transformers calls nanoDVA. The model itself is model.py, next to this file in every folder
that tools/convert.py writes.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
"""
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .model import GPT, ModelConfig


class NanoDVAConfig(PretrainedConfig):
    """model_config are the settings of ModelConfig. vocab_size counts tokens, without padding."""
    model_type = "nanodva"

    def __init__(self, model_config=None, tie_word_embeddings=True, **settings):
        self.model_config = model_config or {}
        # What transformers itself asks for
        self.num_hidden_layers = self.model_config.get("n_layer")
        self.hidden_size = self.model_config.get("n_embd")
        super().__init__(tie_word_embeddings=tie_word_embeddings, **settings)


class NanoDVAForCausalLM(PreTrainedModel, GenerationMixin):
    """
    generate() runs the whole window for each new token, since transformers' caches know neither
    DVA nor banks; sample.py has a cache of its own. A text that is longer than block_size goes on
    from its last block_size tokens.
    """
    config_class = NanoDVAConfig
    base_model_prefix = "gpt"
    _tied_weights_keys = {"gpt.lm_head.weight": "gpt.transformer.wte.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.gpt = GPT(ModelConfig(**config.model_config))
        self.post_init()

    def _init_weights(self, module):
        """
        GPT has done it. But from_pretrained leaves in every buffer that no file holds, such as the
        tables of rotary positions, whatever was in memory: compute them again.
        """
        buffers = dict(module.named_buffers(recurse=False))
        names = [name for name, own in self.gpt.named_modules() if own is module]
        if buffers and names:
            fresh = GPT(self.gpt.config).get_submodule(names[0])
            for name, buffer in buffers.items():
                buffer.copy_(fresh.get_buffer(name))

    def get_input_embeddings(self):
        return self.gpt.transformer.wte

    def get_output_embeddings(self):
        return self.gpt.lm_head

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **unused):
        size = self.gpt.config.block_size
        mask = attention_mask if attention_mask is None else attention_mask[:, -size:]
        return {"input_ids": input_ids[:, -size:], "attention_mask": mask}

    def forward(self, input_ids, attention_mask=None, labels=None, **settings):
        """Token ids (B, T) -> logits (B, T, V), and with labels (B, T) their loss."""
        if attention_mask is not None and (attention_mask.diff() > 0).any():
            raise ValueError("padding before a text moves its positions, and is not left out: put "
                             "it after the text, or give texts of one length")
        logits, loss = self.gpt(input_ids)[..., :self.config.vocab_size], None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **settings)
        return CausalLMOutput(loss=loss, logits=logits)


# So that save_pretrained copies this file and model.py, too
NanoDVAConfig.register_for_auto_class()
NanoDVAForCausalLM.register_for_auto_class("AutoModelForCausalLM")
