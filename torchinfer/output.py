"""A sample's way from token ids to text: incremental decoding and stop strings."""

from __future__ import annotations

from torchinfer.request import SamplingParams
from torchinfer.tokenizer import IncrementalDecoder, StopChecker, Tokenizer


class SampleText:
    """Text of one sample as it grows."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int], params: SamplingParams) -> None:
        self._decoder = IncrementalDecoder(tokenizer, prompt_ids)
        self._stop = StopChecker(params.stop) if params.stop else None

    def push(self, token_id: int) -> tuple[str, str | None]:
        """The text that may be sent now, and the stop string that ended the sample, if one did."""
        text = self._decoder.push(token_id)
        return self._stop.push(text) if self._stop else (text, None)

    def flush(self) -> tuple[str, str | None]:
        """What was held back, when no more tokens come; it may hold a stop string too."""
        text = self._decoder.flush()
        if self._stop is None:
            return text, None
        text, match = self._stop.push(text)
        return (text, match) if match else (text + self._stop.flush(), None)
