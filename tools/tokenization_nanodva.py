"""How transformers reads and writes single characters, with trust_remote_code=True."""
from transformers import PreTrainedTokenizerFast


class CharacterTokenizer(PreTrainedTokenizerFast):
    """
    The new line is the first, the end and the padding token, as programs expect them, but part of
    the text: unlike special tokens it is not left out. An unknown character is named.
    """

    def _encode_plus(self, text, *arguments, **options):
        try:
            return super()._encode_plus(text, *arguments, **options)
        except Exception as error:
            unknown = sorted(set("".join(text)) - self.get_vocab().keys())
            if not unknown:
                raise
            raise ValueError(f"characters that are not in the model's alphabet: "
                             f"{''.join(unknown)[:40]!r}") from error

    def _decode(self, token_ids, *arguments, **options):
        return super()._decode(token_ids, skip_special_tokens=False,
                               clean_up_tokenization_spaces=False)


CharacterTokenizer.register_for_auto_class("AutoTokenizer")
