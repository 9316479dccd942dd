"""A sample's way from token ids to text: incremental decoding and stop strings."""

from __future__ import annotations

from torchinfer.request import SamplingParams
from torchinfer.tokenizer import IncrementalDecoder, StopChecker, Tokenizer


class SampleText:
    """Text of one sample as it grows. Without a tokenizer the text is empty."""

    def __init__(self, tokenizer: Tokenizer | None, prompt_ids: list[int], params: SamplingParams) -> None:
        self._decoder = IncrementalDecoder(tokenizer, prompt_ids) if tokenizer else None
        self._stop = StopChecker(params.stop) if params.stop else None

    def push(self, token_id: int) -> tuple[str, str | None]:
        """The text that may be sent now, and the stop string that ended the sample, if one did."""
        if self._decoder is None:
            return "", None
        text = self._decoder.push(token_id)
        return self._stop.push(text) if self._stop else (text, None)

    def flush(self) -> tuple[str, str | None]:
        """What was held back, when no more tokens come; it may hold a stop string too."""
        if self._decoder is None:
            return "", None
        text = self._decoder.flush()
        if self._stop is None:
            return text, None
        text, match = self._stop.push(text)
        return (text, match) if match else (text + self._stop.flush(), None)
