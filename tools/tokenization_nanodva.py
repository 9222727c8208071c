"""How transformers reads and writes single characters, with trust_remote_code=True."""
from transformers import PreTrainedTokenizerFast


class CharacterTokenizer(PreTrainedTokenizerFast):
    """
    The new line is the first, the end and the padding token, since programs ask for such tokens,
    but it is part of the text: decoding keeps it. An error about unknown characters names them.
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
