"""Tokenizers: against transformers, and text token by token against text at once."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from torchinfer.errors import CheckpointError, RequestError
from torchinfer.tokenizer import IncrementalDecoder, Tokenizer

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  two leading spaces, and a tab\tand\n\nnewlines ",
    "Größe naïve café Ångström",
    "你好，世界。日本語のテキスト 한국어",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 flags 🇩🇪🇫🇷",
    "e\u0301 a\u0308 n\u0303 combining \u0915\u094d\u0937 देवनागरी",
    "עברית العربية ไทย",
    'def f(x):\n    return {"a": [1, 2.5]}  # ok',
    " , . ! don't 's n't",
)
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level() -> PreTrainedTokenizerFast:
    """Like GPT-2, Llama 3 and Qwen: each character of a token stands for a byte."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>"]
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.add_tokens([AddedToken("<tool call> é", special=False)])
    return wrap(backend)


def byte_fallback_backend() -> Backend:
    words = sorted({character for text in TEXTS[:3] for character in text if not character.isspace()} | {"▁"})
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {word: len(vocab) + i for i, word in enumerate([*words, "▁t", "▁th", "qu", "▁▁", "ow", "▁▁▁▁"])}
    merges = [("▁", "t"), ("▁t", "h"), ("q", "u"), ("▁", "▁"), ("o", "w"), ("▁▁", "▁▁")]
    return Backend(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))


def llama_2() -> PreTrainedTokenizerFast:
    """Like Llama 2 and Mistral: a space before the text, taken away by the decoder; bytes for what is unknown."""
    backend = byte_fallback_backend()
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrap(backend)


def gemma() -> PreTrainedTokenizerFast:
    """Like Gemma: no space before the text, none taken away."""
    backend = byte_fallback_backend()
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return wrap(backend)


def metaspace() -> PreTrainedTokenizerFast:
    """A Metaspace pre-tokenizer and decoder, with byte fallback."""
    backend = byte_fallback_backend()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always", split=False)]
    )
    return wrap(backend)


def wrap(backend: Backend) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


FAMILIES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte_level": byte_level,
    "llama_2": llama_2,
    "gemma": gemma,
    "metaspace": metaspace,
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def reference(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return FAMILIES[request.param]()


@pytest.fixture(scope="module")
def tokenizer(reference: PreTrainedTokenizerFast) -> Tokenizer:
    return Tokenizer(reference)


def decode_by_token(tokenizer: Tokenizer, ids: list[int], prompt_ids: list[int] | None = None) -> str:
    decoder = IncrementalDecoder(tokenizer, prompt_ids or [])
    return "".join([decoder.push(token_id) for token_id in ids] + [decoder.flush()])


@pytest.mark.parametrize("text", [*TEXTS, "", " ", "<s> in the text", "<tool call> é"])
@pytest.mark.parametrize("special", [True, False])
def test_ids_are_those_of_transformers(
    tokenizer: Tokenizer, reference: PreTrainedTokenizerFast, text: str, special: bool
) -> None:
    assert tokenizer.encode(text, special) == reference(text, add_special_tokens=special)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("skip", [True, False])
def test_text_is_that_of_transformers(
    tokenizer: Tokenizer, reference: PreTrainedTokenizerFast, text: str, skip: bool
) -> None:
    ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
    assert tokenizer.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)


def test_vocabulary_and_eos(tokenizer: Tokenizer, reference: PreTrainedTokenizerFast) -> None:
    assert tokenizer.vocab_size == len(reference)
    assert tokenizer.eos_token_id == reference.convert_tokens_to_ids("</s>")


def test_special_tokens_are_known(tokenizer: Tokenizer, reference: PreTrainedTokenizerFast) -> None:
    special = {token_id for token_id in range(tokenizer.vocab_size) if tokenizer.is_special(token_id)}
    assert special == set(reference.all_special_ids)


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"lone surrogate, '\\ud83d', at character 3"):
        tokenizer.encode("abc\ud83d")


def test_truncation_and_padding_of_the_file_do_not_apply() -> None:
    reference = byte_level()
    reference.backend_tokenizer.enable_truncation(3)
    reference.backend_tokenizer.enable_padding(length=100)
    tokenizer = Tokenizer(reference)
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]


def test_threads_do_not_disturb_each_other() -> None:
    tokenizer = Tokenizer(byte_level())
    expected = [tokenizer.encode(text) for text in TEXTS]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(20):
            assert list(threads.map(tokenizer.encode, TEXTS)) == expected


def test_a_decoder_of_an_unknown_kind_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    reference = byte_level()
    reference.backend_tokenizer.decoder = decoders.Sequence([decoders.Replace("x", "y"), decoders.ByteLevel()])
    Tokenizer(reference)
    assert "unusual decoder ['ByteLevel', 'Replace']" in caplog.text


def test_unknown_ids_add_nothing(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the dog", add_special_tokens=False)
    with_unknown = [10**6, ids[0], 10**6, *ids[1:], 10**6]
    assert decode_by_token(tokenizer, with_unknown) == tokenizer.decode(with_unknown) == tokenizer.decode(ids)


def test_a_folder_without_tokenizer_files_has_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert Tokenizer.from_folder(tmp_path) is None


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_folder_round_trip(tmp_path: Path, family: str) -> None:
    FAMILIES[family]().save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer is not None
    assert tokenizer.encode(TEXTS[4]) == reference(TEXTS[4])["input_ids"]


@pytest.mark.parametrize("named", ["LlamaTokenizer", "PreTrainedTokenizerFast", "Qwen2Tokenizer", "Unknown"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "qwen3", "unknown"])
@pytest.mark.parametrize("family", ["byte_level", "llama_2"])
def test_the_class_is_that_which_transformers_finds_by_the_models_own_config(
    tmp_path: Path, family: str, model_type: str, named: str
) -> None:
    FAMILIES[family]().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": named}))
    found, reference = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert found is not None and type(found._tokenizer) is type(reference)
    assert found.encode(TEXTS[4]) == reference(TEXTS[4])["input_ids"]


def test_a_damaged_tokenizer_is_an_error(tmp_path: Path) -> None:
    byte_level().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=f"cannot load the tokenizer of {tmp_path}"):
        Tokenizer.from_folder(tmp_path)


def test_code_of_the_checkpoint_is_not_run(tmp_path: Path) -> None:
    byte_level().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("open('ran', 'w')\nfrom transformers import GPT2TokenizerFast as Own\n")
    with pytest.raises(CheckpointError, match="trust_remote_code=False"):
        Tokenizer.from_folder(tmp_path)


def test_importing_the_module_does_not_import_transformers() -> None:
    code = "import sys, torchinfer.tokenizer; print({'transformers', 'tokenizers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


def test_a_tokenizer_does_not_bring_the_code_of_models() -> None:
    folder = Path(__file__).parents[1] / "recipes" / "tiny-llama"
    code = "import sys; from torchinfer.tokenizer import Tokenizer; Tokenizer.from_folder(sys.argv[1]); "
    code += "print({'accelerate', 'torch_xla', 'transformers.modeling_utils'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


@pytest.fixture(scope="module")
def chat() -> Tokenizer:
    reference = byte_level()
    reference.chat_template = TEMPLATE
    return Tokenizer(reference)


@pytest.mark.parametrize("prompt", [True, False])
def test_chat_template_is_applied_without_a_second_bos(chat: Tokenizer, prompt: bool) -> None:
    messages = [{"role": "system", "content": "short"}, {"role": "user", "content": "Grüße 🙂"}]
    expected = "<|system|>short<|user|>Grüße 🙂" + ("<|assistant|>" if prompt else "")
    assert chat.apply_chat_template(messages, prompt) == chat.encode(expected, add_special_tokens=False)


def test_chat_template_gives_the_ids_of_transformers(chat: Tokenizer) -> None:
    reference = byte_level()
    reference.chat_template = TEMPLATE
    messages = [{"role": "user", "content": "the dog"}]
    ids = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert chat.apply_chat_template(messages) == ids


def test_no_template_is_an_error(tokenizer: Tokenizer) -> None:
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match="no chat template; send a plain prompt"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_what_the_template_refuses_is_a_request_error(chat: Tokenizer) -> None:
    with pytest.raises(RequestError, match="refuses these messages: no tools here"):
        chat.apply_chat_template([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"\[\] must be a list of at least one message"),
        ("hello", "'hello' must be a list"),
        ({"role": "user"}, "must be a list"),
        (["hello"], "message 0 is 'hello'; a mapping"),
        ([{"role": "user"}], "message 0 has content=None; a string"),
        ([{"role": 3, "content": "x"}], "message 0 has role=3; a string"),
        ([{"role": "user", "content": "x", "image": "y"}], "message 0 has image; only role and content"),
        ([{"content": "x"}, 7], r"(?s)message 0 has role=None.*message 1 is 7"),
    ],
)
def test_malformed_messages_are_refused(chat: Tokenizer, messages: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        chat.apply_chat_template(messages)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", TEXTS)
def test_text_by_token_is_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.eos_token_id is not None
    ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
    assert decode_by_token(tokenizer, ids) == tokenizer.decode(ids)


def test_random_ids_by_token_are_their_text(tokenizer: Tokenizer) -> None:
    generator = random.Random(0)
    num_clean = 0
    for _ in range(3000):
        ids = [generator.randrange(tokenizer.vocab_size) for _ in range(generator.randrange(1, 8))]
        text = tokenizer.decode(ids)
        if "\ufffd" not in text:
            num_clean += 1
            assert decode_by_token(tokenizer, ids) == text, ids
    assert num_clean > 100


def test_random_texts_after_random_prompts_continue_them(tokenizer: Tokenizer) -> None:
    generator = random.Random(1)
    for _ in range(500):
        prompt = tokenizer.encode(generator.choice(TEXTS))
        ids = tokenizer.encode(generator.choice(TEXTS), add_special_tokens=False)
        whole = tokenizer.decode(prompt + ids)
        assert decode_by_token(tokenizer, ids, prompt) == whole[len(tokenizer.decode(prompt)) :]


def test_invalid_bytes_of_byte_level_are_as_decoded_at_once() -> None:
    tokenizer = Tokenizer(byte_level())
    generator = random.Random(2)
    for _ in range(3000):
        ids = [generator.randrange(tokenizer.vocab_size) for _ in range(generator.randrange(1, 12))]
        assert decode_by_token(tokenizer, ids) == tokenizer.decode(ids), ids


@pytest.mark.parametrize("character", ["é", "世", "🙂"])
def test_no_part_of_a_character_is_emitted(character: str) -> None:
    tokenizer = Tokenizer(llama_2())
    decoder = IncrementalDecoder(tokenizer, [])
    pieces = [decoder.push(3 + byte) for byte in character.encode()]
    assert pieces == [""] * (len(pieces) - 1) + [character]
    assert decoder.flush() == ""


def test_at_most_three_bytes_are_held_back(tokenizer: Tokenizer) -> None:
    generator = random.Random(3)
    decoder = IncrementalDecoder(tokenizer, [])
    num_bytes = num_emitted = 0
    for _ in range(5000):
        token_id = generator.randrange(tokenizer.vocab_size)
        num_bytes += len(tokenizer.piece(token_id))
        # One U+FFFD stands for at most three bytes and has three itself, so emitted bytes never fall behind by more.
        num_emitted += len(decoder.push(token_id).encode())
        assert num_bytes - num_emitted <= 4  # three, and the space that sentencepiece drops


def test_an_incomplete_character_ends_as_a_replacement(tokenizer: Tokenizer) -> None:
    first_byte = next(i for i in range(tokenizer.vocab_size) if tokenizer.piece(i) == b"\xf0")
    letter = tokenizer.encode("a", add_special_tokens=False)[-1]
    decoder = IncrementalDecoder(tokenizer, [letter])
    assert (decoder.push(first_byte), decoder.flush()) == ("", "\ufffd")
    decoder = IncrementalDecoder(tokenizer, [letter])
    assert (decoder.push(first_byte), decoder.push(letter)[:2]) == ("", "\ufffda")


def test_a_valid_character_after_invalid_bytes_survives() -> None:
    tokenizer = Tokenizer(llama_2())
    ids = [3 + byte for byte in b"\xff\xff\xff\xe4\xbd\xa0"]
    assert decode_by_token(tokenizer, ids) == "\ufffd\ufffd\ufffd你"


def test_a_character_that_the_prompt_began_is_completed() -> None:
    tokenizer = Tokenizer(llama_2())
    prompt, ids = [3 + byte for byte in b"a\xf0\x9f"], [3 + byte for byte in b"\x99\x82!"]
    assert decode_by_token(tokenizer, ids, prompt) == "🙂!"


def test_leading_space_depends_on_what_precedes() -> None:
    tokenizer = Tokenizer(llama_2())
    (word,) = tokenizer.encode("th", add_special_tokens=False)
    assert decode_by_token(tokenizer, [word]) == "th"
    assert decode_by_token(tokenizer, [word], prompt_ids=[1]) == "th"  # <s> is no text
    assert decode_by_token(tokenizer, [word], prompt_ids=[1, word]) == " th"
    assert decode_by_token(tokenizer, [1, word, word]) == "th th"


def test_special_tokens_add_nothing_and_do_not_part_a_character() -> None:
    tokenizer = Tokenizer(llama_2())
    first, second = (3 + byte for byte in "é".encode())
    assert decode_by_token(tokenizer, [1, first, 2, second, 2]) == "é"


def test_added_tokens_are_text() -> None:
    tokenizer = Tokenizer(byte_level())
    (token_id,) = tokenizer.encode("<tool call> é", add_special_tokens=False)
    assert decode_by_token(tokenizer, [token_id]) == "<tool call> é"


def test_each_token_is_decoded_once_however_often_it_comes() -> None:
    reference = llama_2()
    tokenizer = Tokenizer(reference)
    ids = tokenizer.encode("the quick brown fox " * 3, add_special_tokens=False)
    decode_by_token(tokenizer, ids)
    calls: list[list[int]] = []
    tokenizer.decode = lambda ids, skip_special_tokens=True: calls.append(list(ids)) or ""  # type: ignore[method-assign]
    decode_by_token(tokenizer, ids, prompt_ids=ids)
    assert calls == []
