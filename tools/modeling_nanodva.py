"""
How transformers calls nanoDVA. The model itself is model.py, next to this file in every folder
that tools/convert.py writes.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
"""
import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .model import GPT, Cache, ModelConfig


class NanoDVAConfig(PretrainedConfig):
    """model_config are the settings of ModelConfig."""
    model_type = "nanodva"

    def __init__(self, model_config=None, tie_word_embeddings=True, **settings):
        self.model_config = model_config or {}
        # The names by which other programs ask
        self.num_hidden_layers = self.model_config.get("n_layer")
        self.hidden_size = self.model_config.get("n_embd")
        self.max_position_embeddings = self.model_config.get("block_size")
        self.vocab_size = self.model_config.get("vocab_size")
        super().__init__(tie_word_embeddings=tie_word_embeddings, **settings)


class NanoDVAModel(PreTrainedModel):
    """
    Token ids -> the stream after the final norm. Padding may be on either side of a text: by the
    attention mask it is moved after the text, which causal attention does not see, and back.
    """
    config_class = NanoDVAConfig
    base_model_prefix = "gpt"
    supports_gradient_checkpointing = True
    _tied_weights_keys = {"gpt.lm_head.weight": "gpt.transformer.wte.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.gpt = GPT(ModelConfig(**config.model_config))
        self.gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module):
        """
        GPT initialises itself. But from_pretrained leaves buffers that are in no file, such as the
        rotary table, uninitialised: compute them again.
        """
        buffers = dict(module.named_buffers(recurse=False))
        names = [name for name, own in self.gpt.named_modules() if own is module]
        if buffers and names:
            fresh = GPT(self.gpt.config).get_submodule(names[0])
            for name, buffer in buffers.items():
                buffer.copy_(fresh.get_buffer(name))
        elif isinstance(module, nn.Embedding) and not names:
            # The new table of resize_token_embeddings()
            nn.init.normal_(module.weight, std=0.02)

    def get_input_embeddings(self):
        return self.gpt.transformer.wte

    def set_input_embeddings(self, value):
        self.gpt.transformer.wte = value

    def get_output_embeddings(self):
        return self.gpt.lm_head

    def set_output_embeddings(self, value):
        self.gpt.lm_head = value

    def resize_token_embeddings(self, *arguments, **options):
        """transformers' method; a new token's row in a bank is the mean of the old rows."""
        embedding = super().resize_token_embeddings(*arguments, **options)
        rows = self.gpt.config.vocab_size = embedding.num_embeddings
        self.config.model_config = self.config.model_config | {"vocab_size": rows}
        for bank in self.gpt.banks():
            mean = bank.table.data.mean(dim=0, keepdim=True)
            added = mean.expand(max(0, rows - len(bank.table)), -1)
            bank.table = nn.Parameter(torch.cat((bank.table.data, added))[:rows])
        return embedding

    def run(self, input_ids, attention_mask, inputs_embeds, output_hidden_states, unsupported,
            cache=None):
        """GPT.forward up to the final norm, with what transformers may ask for in addition."""
        unsupported.setdefault("output_attentions", self.config.output_attentions)
        for name, value in unsupported.items():
            if value is not None and value is not False:
                raise ValueError(f"{name} is not supported by nanoDVA's models: leave it out")
        gpt, given = self.gpt, input_ids if inputs_embeds is None else inputs_embeds
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is not None and gpt.banks():
            raise ValueError("a Bank of Values looks up its values by token id: give input_ids, "
                             "not inputs_embeds")
        first, size, back = 0 if cache is None else cache.length, gpt.config.block_size, None
        end = first + given.size(1)
        if end > size:
            raise ValueError(f"{end} positions do not fit into the window of {size}")
        if attention_mask is not None and not attention_mask.all():
            if attention_mask.shape != given.shape[:2] or cache is not None:
                raise ValueError(f"an attention mask {tuple(attention_mask.shape)} is not "
                                 f"supported: give one of {tuple(given.shape[:2])}, and no cache")
            order = (attention_mask == 0).int().argsort(dim=1, stable=True)
            given, back = rearrange(given, order), order.argsort(dim=1)
        x = gpt.transformer.wte(given) if inputs_embeds is None else given
        if gpt.transformer.wpe is not None:
            x = x + gpt.transformer.wpe.weight[first:end]
        x = gpt.transformer.drop(x)
        rotary, states = None, []
        if gpt.rotary is not None:
            rotary = [part[first:end] for part in gpt.rotary]
        if cache is not None:
            given = cache.append_ids(given)
        for block in gpt.transformer.h:
            states.append(x)
            if self.gradient_checkpointing and self.training and cache is None:
                x = self._gradient_checkpointing_func(block.__call__, x, given, rotary)
            else:
                x = block(x, given, rotary, cache)
        if cache is not None:
            cache.length = end
        states.append(gpt.transformer.ln_f(x))
        if back is not None:
            states = [rearrange(x, back) for x in states]
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return BaseModelOutput(last_hidden_state=states[-1],
                               hidden_states=tuple(states) if output_hidden_states else None)

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None,
                output_hidden_states=None, **unsupported):
        """Token ids (B, T), or their embeddings (B, T, C) -> last_hidden_state (B, T, C)."""
        return self.run(input_ids, attention_mask, inputs_embeds, output_hidden_states, unsupported)


class NanoDVAForCausalLM(NanoDVAModel, GenerationMixin):
    """
    generate() uses the KV cache of model.py for texts of one length within the window. Otherwise
    it computes all positions for each new token. A text that is longer than block_size is
    continued from its last block_size tokens.
    """

    # generate() then refuses speculative decoding, which needs a cache that can be shortened
    _is_stateful = True

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, past_key_values=None,
                                      use_cache=True, output_attentions=None,
                                      output_hidden_states=None, **unused):
        size = self.gpt.config.block_size
        asked = {"logits_to_keep": 1, "output_attentions": output_attentions,
                 "output_hidden_states": output_hidden_states}
        if attention_mask is not None and attention_mask.all():
            attention_mask = None
        if use_cache and attention_mask is None and input_ids.size(1) <= size:
            # In the first step it is one of transformers' own
            is_ours = isinstance(past_key_values, GenerationCache)
            cache = past_key_values if is_ours else GenerationCache(size)
            return asked | {"input_ids": input_ids[:, cache.length:], "past_key_values": cache}
        if attention_mask is not None:
            if not attention_mask[:, -1].all():
                raise ValueError("generate() continues each row after its last column: pad before "
                                 "the texts, padding_side='left'")
            attention_mask = attention_mask[:, -size:]
        return asked | {"input_ids": input_ids[:, -size:], "attention_mask": attention_mask}

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None,
                logits_to_keep=0, output_hidden_states=None, num_items_in_batch=None,
                past_key_values=None, use_cache=False, **unsupported):
        """
        Token ids (B, T), or their embeddings (B, T, C) -> logits (B, T, V), of the last
        logits_to_keep positions alone if that is not 0. With labels (B, T) also their loss.
        use_cache=True returns past_key_values, for the calls that continue these texts.
        """
        if use_cache and past_key_values is None:
            past_key_values = GenerationCache(self.gpt.config.block_size)
        if past_key_values is not None and not isinstance(past_key_values, GenerationCache):
            raise ValueError("past_key_values of other models are not supported: use_cache=True "
                             "returns those of this one")
        found = self.run(input_ids, attention_mask, inputs_embeds, output_hidden_states,
                         unsupported, past_key_values)
        logits, loss = self.gpt.lm_head(found.last_hidden_state[:, -logits_to_keep:]), None
        if labels is not None:
            loss = self.loss_function(logits, labels, logits.size(-1),
                                      num_items_in_batch=num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values,
                                      hidden_states=found.hidden_states)


class GenerationCache(Cache):
    """The KV cache of model.py, with rows that beam search can reorder."""

    def reorder_cache(self, rows):
        self.ids = self.ids[rows]
        for store in (self.keys, self.values):
            for layer in store:
                store[layer] = store[layer][rows]


def rearrange(x, order):
    """The columns of x (B, T, ...) in the order (B, T) of each row."""
    return x[torch.arange(len(x), device=x.device)[:, None], order]


# save_pretrained then copies this file and model.py, too
NanoDVAConfig.register_for_auto_class()
NanoDVAModel.register_for_auto_class("AutoModel")
NanoDVAForCausalLM.register_for_auto_class("AutoModelForCausalLM")
