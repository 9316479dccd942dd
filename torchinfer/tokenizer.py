"""Text to token ids and back: a checkpoint's tokenizer, text as tokens arrive, and stop strings in it.

Decoding goes straight to the `tokenizers` backend. Its output is not "cleaned up" afterwards (transformers' option that
turns " ." into "."), so that a text does not depend on whether it was decoded at once or token by token.
"""

from __future__ import annotations

import codecs
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchinfer.errors import CheckpointError, RequestError, raise_all

logger = logging.getLogger(__name__)

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
FALLBACK_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
MAX_CHARACTER_BYTES = 4
MESSAGE_KEYS = {"role", "content"}


class Tokenizer:
    """A fast tokenizer of transformers. May be used by several threads at once."""

    def __init__(self, tokenizer: Any) -> None:  # a transformers.PreTrainedTokenizerFast
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        # A tokenizer.json may ask to cut or pad every text; a prompt must arrive as it is.
        self._backend.no_truncation()
        self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        kinds = _decoder_kinds(json.loads(self._backend.decoder.__getstate__())) if self._backend.decoder else set()
        self._is_byte_level = "ByteLevel" in kinds
        self._has_byte_fallback = "ByteFallback" in kinds
        if self._is_byte_level and kinds != {"ByteLevel"}:
            logger.warning("unusual decoder %s: streamed text may differ from text decoded at once", sorted(kinds))
        self._anchor_ids = self._find_anchor()
        self._anchor_length = len(self.decode(self._anchor_ids))
        self._pieces: dict[int, bytes] = {}

    @classmethod
    def from_folder(cls, path: str | Path, *, address: str | None = None) -> Tokenizer | None:
        """The tokenizer of a checkpoint's folder; None if the folder has no tokenizer files. `address`: what errors
        call the folder, where it holds copies.

        Raises:
            CheckpointError: there are files, but no fast tokenizer can be made of them without running their code.
        """
        if not any((Path(path) / name).is_file() for name in VOCABULARY_FILES):
            return None
        from transformers import AutoTokenizer  # takes seconds to import

        load: Any = AutoTokenizer.from_pretrained
        try:
            config = _plain_config(Path(path))
            tokenizer = load(str(path), config=config, trust_remote_code=False, use_fast=True, local_files_only=True)
        except Exception as error:  # the files decide which of transformers' and Rust's exceptions comes
            raise CheckpointError(
                f"cannot load the tokenizer of {address or path}: {error}; its files must make a tokenizer that "
                "transformers' AutoTokenizer loads with trust_remote_code=False"
            ) from error
        if not tokenizer.is_fast:
            raise CheckpointError(
                f"the tokenizer of {address or path} is a {type(tokenizer).__name__}, which has no fast version; add a "
                "tokenizer.json to the folder"
            )
        return cls(tokenizer)

    @property
    def eos_token_id(self) -> int | None:
        eos: int | None = self._tokenizer.eos_token_id
        return eos

    @property
    def bos_token_id(self) -> int | None:
        bos: int | None = self._tokenizer.bos_token_id
        return bos

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. The model may have more rows than that."""
        size: int = self._backend.get_vocab_size(with_added_tokens=True)
        return size

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    @property
    def chat_template(self) -> str | None:
        """The template's text, for people; None if there is none or it has several with names."""
        template = self._tokenizer.chat_template
        return template if isinstance(template, str) else None

    def is_special(self, token_id: int) -> bool:
        """Whether decoding leaves this token out."""
        return token_id in self._special_ids

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text; with the special tokens that the model expects around it, such as BOS.

        Raises:
            RequestError: the text has half a surrogate pair and so is no Unicode text.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text has a lone surrogate, {text[error.start]!r}, at character {error.start}; send whole Unicode "
                "characters"
            ) from error
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; an id that the tokenizer does not know adds nothing."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> list[int]:
        """The ids of a conversation, each message a mapping of role and content.

        Raises:
            RequestError: as `chat_text`.
        """
        return self.encode(self.chat_text(messages, add_generation_prompt), add_special_tokens=False)

    def chat_text(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the chat template makes of it, special tokens included.

        Raises:
            RequestError: the checkpoint has no chat template, a message is malformed, or the template refuses them.
        """
        if not self.has_chat_template:
            raise RequestError("this model's tokenizer has no chat template; send a plain prompt instead of messages")
        raise_all(_message_problems(messages), RequestError, "invalid messages")
        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # templates are programs: what they raise is up to them
            raise RequestError(f"the model's chat template refuses these messages: {error}") from error
        return text

    def piece(self, token_id: int) -> bytes:
        """What a token adds to a text that has begun: UTF-8, maybe parts of characters; empty for special tokens."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._make_piece(token_id)
        return piece

    def first_piece(self, token_id: int) -> bytes:
        """What a token gives at the beginning of a text, where sentencepiece drops a space."""
        piece = self.piece(token_id)
        is_part_of_character = len(piece) == 1 and piece[0] >= 0x80
        if self._is_byte_level or is_part_of_character:
            return piece
        return self.decode([token_id]).encode("utf-8")

    def _make_piece(self, token_id: int) -> bytes:
        token: str | None = self._backend.id_to_token(token_id)
        if token is None or token_id in self._special_ids:
            return b""
        if self._is_byte_level:
            return _byte_level_bytes(token)
        if self._has_byte_fallback and (match := FALLBACK_BYTE.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return self.decode([*self._anchor_ids, token_id])[self._anchor_length :].encode("utf-8")

    def _find_anchor(self) -> list[int]:
        """A token to put before another one, so that the decoder does not take that for the first of its text."""
        for text in ("a", "0", "."):
            for token_id in reversed(self.encode(text, add_special_tokens=False)):
                alone = self.decode([token_id])
                if alone.strip() and "\ufffd" not in alone and self.decode([token_id] * 2).startswith(alone):
                    return [token_id]
        return []


class IncrementalDecoder:
    """The text of one stream of tokens, piece by piece, in whole characters.

    The pieces put together are the decoded text of all ids. At most three bytes, an incomplete character, are held
    back; bytes that are no UTF-8 become U+FFFD, one for each maximal invalid part. Special tokens add nothing.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        """`prompt_ids` precede the stream: with a text before it, its first token keeps its leading space, and it may
        complete a character that the prompt began."""
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_first = not any(tokenizer.piece(token_id) for token_id in prompt_ids)
        tail = b"".join(tokenizer.piece(token_id) for token_id in prompt_ids[-MAX_CHARACTER_BYTES:])
        self._utf8.decode(tail[-MAX_CHARACTER_BYTES:])

    def push(self, token_id: int) -> str:
        """The text that is complete with this token; often one word, sometimes nothing."""
        piece = self._tokenizer.piece(token_id)
        if self._is_first and piece:
            self._is_first = False
            piece = self._tokenizer.first_piece(token_id)
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """What is held back at the end of the stream: U+FFFD for an incomplete character, or nothing."""
        return self._utf8.decode(b"", final=True)


class StopChecker:
    """Looks for stop strings in text that arrives in pieces.

    The match is the stop string that is complete first; of several that end together, the longest. It does not depend
    on how the text is cut into pieces.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        assert all(stop), "an empty stop string matches everywhere; SamplingParams refuses it"
        self._stop = tuple(stop)
        self._held = ""
        self._match: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that may be shown now and the stop string that was found, if any.

        Text that may be the beginning of a stop string is held back; a match and what follows it are never shown.
        """
        if not self._stop:
            return text, None
        if self._match is not None:
            return "", self._match
        text = self._held + text
        start = self._find(text)
        if self._match is not None:
            self._held = ""
            return text[:start], self._match
        shown = len(text) - self._length_to_hold(text)
        self._held = text[shown:]
        return text[:shown], None

    def flush(self) -> str:
        """The text that is held back, when the stream ends without a match."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> int:
        """Where the match begins, if there is one; it goes to `_match`."""
        ends = [(position + len(stop), position, stop) for stop in self._stop if (position := text.find(stop)) >= 0]
        if not ends:
            return -1
        _, start, self._match = min(ends)
        return start

    def _length_to_hold(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = 0
        for stop in self._stop:
            position = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while position >= 0 and len(text) - position > longest:
                if stop.startswith(text[position:]):
                    longest = len(text) - position
                position = text.find(stop[0], position + 1)
        return longest


def _plain_config(folder: Path) -> Any:
    """A config of transformers' base class with what AutoTokenizer asks one for; None, and it loads the model's own,
    where a file is missing or broken, or the tokenizer's names no class, or one of the checkpoint's own code.

    With the model's own comes its code, and with that accelerate and torch_xla where they are installed: two seconds
    and 240 MiB of a process.
    """
    from transformers import PretrainedConfig

    try:
        model = json.loads((folder / "config.json").read_bytes())
        named = json.loads((folder / "tokenizer_config.json").read_bytes())
        if not named["tokenizer_class"] or "auto_map" in named:
            return None
        known = {key: model[key] for key in ("model_type", "name", "tokenizer_class") if key in model}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return PretrainedConfig.from_dict(known, name_or_path=str(folder))


def _decoder_kinds(decoder: Mapping[str, Any]) -> set[str]:
    """Types of a decoder and of those in its sequence."""
    if decoder["type"] == "Sequence":
        return set().union(*(_decoder_kinds(part) for part in decoder["decoders"]))
    return {decoder["type"]}


def _byte_level_bytes(token: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary stands for; an added token stands for itself."""
    try:
        return bytes(BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode("utf-8")


def _byte_of_character() -> dict[str, int]:
    """How byte-level vocabularies write bytes: printable ones as themselves, the others from U+0100 on.

    Source: https://github.com/openai/gpt-2/blob/master/src/encoder.py, bytes_to_unicode.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


def _message_problems(messages: Sequence[Mapping[str, str]]) -> list[str]:
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        return [f"{messages!r:.80} must be a list of at least one message"]
    problems = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            problems.append(f"message {number} is {message!r:.80}; a mapping of role and content is expected")
            continue
        for key in sorted(MESSAGE_KEYS):
            if not isinstance(message.get(key), str):
                problems.append(f"message {number} has {key}={message.get(key)!r:.80}; a string is expected")
        if unknown := sorted(map(str, set(message) - MESSAGE_KEYS)):
            problems.append(f"message {number} has {', '.join(unknown)}; only role and content are supported")
    return problems
