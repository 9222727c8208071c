"""What people do with an exported model: transformers' own functions, and other packages."""
import re

import pytest
import torch
from conftest import ROOT, save_run, shaken, tiny, tokens
from test_convert import ALPHABET, exported, loaded
from torch.nn.functional import cross_entropy

from model import generate
from nanodva.tokenizer import Tokenizer
from nanodva.weights import load_model

pytestmark = pytest.mark.usefixtures("code_folder")

# All that plain GPT-2 cannot express: each way to know positions, with a bank and without
OWN = [dict(block="dva", rotary="only"), dict(block="dva", rotary=False, bank_layers=1),
       dict(block="gpt2", rotary="only", bank_layers=1), dict(block="gpt2", rotary=True)]

@pytest.fixture(scope="module", params=OWN, ids=str)
def own(request, tmp_path_factory):
    """(model, the folder of its export) of each system that brings its code."""
    return exported(tmp_path_factory.mktemp("own"), **request.param)


# ---- transformers --------------------------------------------------------------------------------

@torch.no_grad()
def test_padded_rows_are_computed_as_if_alone(own):
    model, theirs, idx = own[0], loaded(own[1]), tokens(4, 40, V=65)
    # A whole row, padding on the left, on the right, and on both sides and within
    mask = torch.ones_like(idx)
    mask[1, :35] = mask[2, 17:] = mask[3, :11] = mask[3, 28:] = mask[3, [15, 20]] = 0
    found = theirs(idx, attention_mask=mask, output_hidden_states=True)
    for row, is_text in enumerate(mask.bool()):
        text = idx[row, is_text][None]
        alone = theirs(text, output_hidden_states=True)
        assert (alone.logits - model(text)).abs().max() < 1e-5
        assert (found.logits[row, is_text] - alone.logits[0]).abs().max() < 1e-5
        for state, state_alone in zip(found.hidden_states, alone.hidden_states, strict=True):
            assert (state[row, is_text] - state_alone[0]).abs().max() < 1e-5


@torch.no_grad()
def test_texts_of_unlike_lengths_are_continued_together(own):
    theirs = loaded(own[1])
    idx, mask = tokens(3, 40, V=65), torch.ones(3, 40, dtype=torch.long)
    mask[0, :35], mask[1, :3] = 0, 0
    # Up to the window, beyond it, and by beam search
    for options in (dict(max_new_tokens=24), dict(max_new_tokens=50),
                    dict(max_new_tokens=5, num_beams=2)):
        together = theirs.generate(idx, attention_mask=mask, do_sample=False, **options)
        for row, is_text in enumerate(mask.bool()):
            alone = theirs.generate(idx[row, is_text][None], do_sample=False, **options)
            assert torch.equal(together[row, len(mask[0]) - mask[row].sum():], alone[0])
    with pytest.raises(ValueError, match="padding_side='left'"):
        theirs.generate(idx, attention_mask=mask.flip(1), max_new_tokens=2)


@torch.no_grad()
def test_the_cache_gives_the_same_texts_from_one_position_per_token(own):
    model, theirs, idx = own[0], loaded(own[1]), tokens(2, 10, V=65)
    widths = []
    theirs.gpt.transformer.h[1].register_forward_pre_hook(
        lambda _, arguments: widths.append(arguments[0].size(1)))
    for options in (dict(), dict(num_beams=3), dict(num_return_sequences=2, num_beams=2)):
        texts = [theirs.generate(idx, max_new_tokens=60, do_sample=False, use_cache=use_cache,
                                 **options) for use_cache in (True, False)]
        assert torch.equal(*texts)
    # Up to the window one position for each token, and beyond it the whole window
    assert widths[:60] == [10] + [1] * 54 + [64] * 5
    first = theirs(idx[:, :7], use_cache=True)
    then = theirs(idx[:, 7:], past_key_values=first.past_key_values)
    assert (torch.cat((first.logits, then.logits), dim=1) - model(idx)).abs().max() < 1e-5
    theirs.train().gradient_checkpointing_enable()
    assert torch.equal(theirs.generate(idx, max_new_tokens=9, do_sample=False),
                       theirs.generate(idx, max_new_tokens=9, do_sample=False, use_cache=False))


@pytest.mark.parametrize("block", ["dva", "gpt2"])
@pytest.mark.parametrize("settings", [{}, dict(tokenizer={"kind": "gpt2:300"}, vocab_size=320)],
                         ids=["characters", "words"])
def test_a_pipeline_writes_texts_in_batches(tmp_path, block, settings):
    from transformers import pipeline
    _, folder = exported(tmp_path, block=block, **settings)
    write = pipeline("text-generation", str(folder), trust_remote_code=True, device="cpu")
    prompts = ["\nA\nB\n", "O", "ALL THE WORLD'S A STAGE"]
    options = dict(max_new_tokens=20, do_sample=False)
    found = [text["generated_text"] for [text] in write(prompts, batch_size=2, **options)]
    expected = [generate(load_model(folder), prompt, 20, temperature=0) for prompt in prompts]
    assert found == expected


@torch.no_grad()
@pytest.mark.parametrize("rows, options", [(70, {}), (61, {}), (66, dict(pad_to_multiple_of=8)),
                                           (80, dict(mean_resizing=False))])
def test_a_resized_vocabulary_is_saved_and_comes_back(own, tmp_path, rows, options):
    theirs = loaded(own[1])
    idx, kept = tokens(2, 20, V=61), min(rows, 65)
    before = theirs(idx).logits[..., :kept]
    theirs.resize_token_embeddings(rows, **options)
    rows = 72 if "pad_to_multiple_of" in options else rows
    assert theirs(idx).logits.shape[-1] == theirs.config.vocab_size == rows
    assert rows == 61 or theirs.gpt.transformer.wte.weight[65:].std() < 0.5
    theirs.save_pretrained(tmp_path / "again")
    again, ours = loaded(tmp_path / "again"), load_model(tmp_path / "again")
    for ids in (idx, idx + rows - 61):
        logits = theirs(ids).logits
        assert torch.equal(again(ids).logits, logits) and torch.equal(ours(ids), logits)
    assert torch.equal(theirs(idx).logits[..., :kept], before)


def test_gradient_checkpointing_gives_the_same_gradients(own):
    theirs, idx = loaded(own[1]).train(), tokens(2, 20, V=65)
    mask = torch.ones_like(idx)
    mask[0, :5] = 0
    calls, gradients = [], []
    theirs.gpt.transformer.h[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for enable in (lambda: None, theirs.gradient_checkpointing_enable):
        enable()
        theirs(idx, attention_mask=mask, labels=idx).loss.backward()
        gradients.append([p.grad for p in theirs.parameters() if p.requires_grad])
        theirs.zero_grad()
    # Once without, twice with: it computes the block again for its gradients
    assert len(calls) == 3
    for first, second in zip(*gradients, strict=True):
        assert (first - second).abs().max() <= 1e-6 * first.abs().max()


@torch.no_grad()
def test_states_embeddings_and_the_model_without_its_head(own, tmp_path):
    model, folder = own
    theirs, base, idx = loaded(folder), loaded(folder, "AutoModel"), tokens(2, 20, V=65)
    found = theirs(idx, output_hidden_states=True)
    table = theirs.get_input_embeddings().weight
    assert len(found.hidden_states) == 3
    assert (found.hidden_states[-1] @ table.T - found.logits).abs().max() < 1e-5
    assert torch.equal(base(idx).last_hidden_state, found.hidden_states[-1])
    assert torch.equal(base(idx, return_dict=False)[0], found.hidden_states[-1])
    assert torch.equal(theirs(idx, logits_to_keep=3).logits, found.logits[:, -3:])
    # Saved without its head it is whole: the head is the token table
    base.save_pretrained(tmp_path / "base")
    assert torch.equal(loaded(tmp_path / "base")(idx).logits, found.logits)
    embeddings = table[idx]
    if model.banks():
        with pytest.raises(ValueError, match="by token id: give input_ids"):
            theirs(inputs_embeds=embeddings)
    else:
        assert torch.equal(theirs(inputs_embeds=embeddings).logits, found.logits)


def test_what_is_not_supported_is_refused_by_name(tmp_path):
    _, folder = exported(tmp_path, block="dva")
    theirs, base, idx = loaded(folder), loaded(folder, "AutoModel"), tokens(2, 20, V=65)
    for model, given, words in (
            *((model, {name: value}, f"{name} is not supported") for model in (theirs, base)
              for name, value in dict(output_attentions=True, position_ids=idx,
                                      token_type_ids=idx).items()),
            (base, dict(use_cache=True), "use_cache is not supported"),
            (theirs, dict(past_key_values=()), "past_key_values of other models are not supported"),
            (theirs, dict(attention_mask=torch.zeros(2, 1, 20, 20)), "give one of .2, 20., and"),
            (theirs, dict(inputs_embeds=torch.zeros(2, 20, 32)), "either input_ids or inputs_emb"),
            (theirs, dict(input_ids=None), "either input_ids or inputs_embeds"),
            (theirs, dict(input_ids=tokens(1, 65)), "65 positions do not fit into the window of")):
        with pytest.raises(ValueError, match=words):
            model(**dict(input_ids=idx) | given)
    assert theirs(idx, output_attentions=False, use_cache=None).loss is None
    for options in (dict(prompt_lookup_num_tokens=3), dict(output_attentions=True,
                                                           return_dict_in_generate=True)):
        with pytest.raises(ValueError, match="stateful|output_attentions is not supported"):
            theirs.generate(idx[:1], max_new_tokens=5, **options)


# ---- other packages ------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("settings", [
    dict(block="dva", rotary="only", n_layer=2, bank_layers=1), dict(block="gpt2", n_layer=1)],
    ids=str)
def test_onnxruntime_takes_any_length_up_to_the_window(tmp_path, monkeypatch, settings):
    pytest.importorskip("onnxscript", reason="pip install onnx onnxscript onnxruntime")
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    [code] = re.findall(r"```python\n((?:(?!```).)*?torch\.onnx.*?)```",
                        (ROOT / "docs" / "interop.md").read_text(), re.DOTALL)
    model = shaken(tiny(block_size=300, **settings))
    save_run(tmp_path / "out-demo", model, None)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    session = onnxruntime.InferenceSession("demo.onnx")
    for length in (1, 8, 257, 300):
        idx = tokens(2, length)
        [logits] = session.run(None, {"ids": idx.numpy()})
        assert (torch.from_numpy(logits) - model(idx)).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("block", ["dva", "gpt2"])
def test_dynamic_quantisation_changes_every_product(block):
    model, idx = shaken(tiny(block=block, n_embd=64)), tokens(2, 16)
    model.tokenizer = Tokenizer({"kind": "char", "alphabet": ALPHABET[:37]})
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    left = [name for name, module in quantised.named_modules() if type(module) is torch.nn.Linear]
    assert not left
    loss = cross_entropy(quantised(idx).flatten(0, 1), idx.flatten())
    exact = cross_entropy(model(idx).flatten(0, 1), idx.flatten())
    assert 0 < abs(loss - exact) < 0.05 * exact
    assert len(generate(quantised, "\n", 5)) == 6


def test_peft_trains_saves_loads_and_merges(own, tmp_path):
    peft = pytest.importorskip("peft", reason="pip install peft")
    model, folder = own
    idx = tokens(4, 20, V=65)
    theirs = peft.get_peft_model(loaded(folder), peft.LoraConfig(target_modules="all-linear", r=4,
                                                                 task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW((p for p in theirs.parameters() if p.requires_grad), lr=1e-2)
    theirs(input_ids=idx, labels=idx).loss.backward()
    optimizer.step()
    theirs.eval().save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(loaded(folder), tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = theirs(idx).logits
        assert (logits - model(idx)).abs().max() > 0.1
        assert torch.equal(again(idx).logits, logits)
        again.merge_and_unload().save_pretrained(tmp_path / "merged")
        assert (load_model(tmp_path / "merged")(idx) - logits).abs().max() < 1e-4
