"""Sampling: prompts of every kind, good and bad, and the same seed gives the same text."""
import pytest
import torch
from conftest import one_error, run_main

import sample
import train
from model import GPT
from prepare_data import Tokenizer


@pytest.fixture
def draw(trained, capsys):
    """draw(**settings): sample.main() on the tiny run; -> (exit status, stdout, stderr)."""
    def draw(**settings):
        settings = dict(out_dir=trained, num_samples=1, max_new_tokens=20, device="cpu", dtype="float32") | settings
        return run_main(sample.main, [f"--{name}={value}" for name, value in settings.items()], capsys)
    return draw


@pytest.fixture
def text(draw):
    """text(**settings): the samples, without what stands between them."""
    def text(**settings):
        status, out, err = draw(**settings)
        assert status == 0 and not err
        return out.split("\n---------------\n")[:-1]
    return text


def alphabet(trained):
    return train.load_checkpoint(trained / "best.pt")["tokenizer"]["alphabet"]


def test_seeds(text):
    first = text(num_samples=3, start="ab", seed=1)
    assert len(first) == 3 and len(set(first)) == 3 and all(len(each) == 22 and each.startswith("ab") for each in first)
    assert text(num_samples=3, start="ab", seed=1) == first != text(num_samples=3, start="ab", seed=2)


def test_temperature_0_is_the_likeliest_token(text, trained):
    checkpoint = train.load_checkpoint(trained / "best.pt")
    model = GPT(train.ModelConfig(**checkpoint["model_config"])).eval()
    model.load_state_dict(checkpoint["model"])
    ids = Tokenizer(checkpoint["tokenizer"]).encode("ab")
    for _ in range(14):                                                # up to the window: no cache, no sampling
        ids.append(model(torch.tensor([ids]))[0][0, -1].argmax().item())
    expected = "".join(checkpoint["tokenizer"]["alphabet"][i] for i in ids)
    assert text(start="ab", temperature=0, max_new_tokens=14, num_samples=2) == [expected] * 2


def test_stop_token(text, trained):
    characters = alphabet(trained)
    whole, = text(start="ab", temperature=1, max_new_tokens=200)
    stop = whole[10]
    end = whole.index(stop, 2)                                         # its first place behind the prompt
    assert text(start="ab", temperature=1, max_new_tokens=200, stop_token=characters.index(stop)) == [whole[:end + 1]]


def test_texts_made_together_end_each_at_its_own(text, trained):
    stop = " "
    texts = text(start="ab", temperature=1, max_new_tokens=40, num_samples=8, stop_token=alphabet(trained).index(stop))
    lengths = {len(each) for each in texts}
    assert len(texts) == 8 and len(lengths) > 2 and max(lengths) <= 42
    assert all(each.index(stop) == len(each) - 1 for each in texts if len(each) < 42)


def test_top_k_1_is_temperature_0(text):
    assert text(start="ab", top_k=1) == text(start="ab", temperature=0)


def test_a_prompt_in_a_file(text, tmp_path):
    (tmp_path / "prompt.txt").write_text("abé cab")
    assert text(start=f"FILE:{tmp_path / 'prompt.txt'}") == text(start="abé cab")


@pytest.mark.parametrize("length", [16, 17, 1000])
def test_a_prompt_longer_than_the_window(text, trained, monkeypatch, length):
    """All of it is printed; the newest 16 characters are seen."""
    seen, forward = [], GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda self, idx, **kw: (seen.append(idx[0].tolist()), forward(self, idx, **kw))[1])
    prompt = ("a" * 1000 + "bcdefghijklmnopr")[-length:]
    long, = text(start=prompt)
    assert long.startswith(prompt) and len(long) == length + 20
    assert seen[0] == [alphabet(trained).index(character) for character in prompt[-16:]]


def test_bad_prompts(draw, trained, tmp_path):
    error = one_error(draw(start="abZ"))
    assert "character 'Z' is not in the alphabet" in error and repr(alphabet(trained)) in error
    assert "start is empty" in one_error(draw(start=""))
    (tmp_path / "prompt.txt").write_bytes(b"ab\xff")
    assert "prompt.txt is not UTF-8: byte 0xff at 2" in one_error(draw(start=f"FILE:{tmp_path / 'prompt.txt'}"))
    (tmp_path / "prompt.txt").write_bytes(b"")
    assert "start is empty" in one_error(draw(start=f"FILE:{tmp_path / 'prompt.txt'}"))
    assert "cannot read the prompt" in one_error(draw(start=f"FILE:{tmp_path / 'nothing.txt'}"))
    assert "cannot read the prompt" in one_error(draw(start=f"FILE:{tmp_path}"))
    assert "character '\\udcff'" in one_error(draw(start="a\udcff"))    # a byte that is not UTF-8, as the shell hands it over


def test_nothing_to_sample_from(draw, tmp_path):
    assert "train first" in one_error(draw(out_dir=tmp_path))
    assert "train first" in one_error(draw(out_dir=tmp_path / "nothing"))


def test_last_is_sampled_where_there_is_no_best(draw, trained, tmp_path):
    (tmp_path / "last.pt").write_bytes((trained / "last.pt").read_bytes())
    assert draw(out_dir=tmp_path, start="ab")[0] == 0


@pytest.mark.parametrize("settings, message", [
    (dict(temperature=-1), "temperature=-1.0: it must be at least 0"), (dict(top_k=-5), "top_k=-5"), (dict(num_samples=0), "num_samples=0"),
    (dict(max_new_tokens=0), "max_new_tokens=0"), (dict(seed=-1), "seed=-1"), (dict(device="cuda:77"), "is not on this machine"),
    (dict(strat="a"), "did you mean 'start'?")], ids=str)
def test_bad_settings(draw, settings, message):
    assert message in one_error(draw(**settings))
