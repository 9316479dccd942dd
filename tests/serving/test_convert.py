from dataclasses import fields

import pytest

from torchinfer.errors import RequestError
from torchinfer.request import FinishReason, SamplingParams, TokenEvent, TokenLogprobs, Usage
from torchinfer.serving import convert
from torchinfer.serving import inference_pb2 as pb

EVERY_PARAM = SamplingParams(
    max_tokens=7,
    min_tokens=2,
    temperature=0.7,
    top_k=5,
    top_p=0.9,
    min_p=0.1,
    repetition_penalty=1.3,
    presence_penalty=-0.4,
    frequency_penalty=0.2,
    logit_bias={3: -1.5, 4: 2.0},
    seed=-5,
    n=2,
    stop=("a", "b"),
    stop_token_ids=(8, 9),
    ignore_eos=True,
    logprobs=0,
    prompt_logprobs=3,
)


def request(**values) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"text": "hi", **values})


def problems(message, tokenizer) -> str:
    with pytest.raises(RequestError) as caught:
        convert.to_request(message, tokenizer, 300)
    return str(caught.value)


def test_the_proto_has_exactly_the_fields_of_sampling_params():
    proto = [field.name for field in pb.SamplingParams.DESCRIPTOR.fields]
    assert proto == [field.name for field in fields(SamplingParams)]


def test_every_sampling_param_is_set_in_this_file():
    """So that the round trip below covers each field."""
    default = SamplingParams()
    assert not [f.name for f in fields(default) if getattr(EVERY_PARAM, f.name) == getattr(default, f.name)]


def test_every_sampling_param_survives_the_round_trip():
    wire = convert.from_sampling_params(EVERY_PARAM).SerializeToString()
    assert convert.to_sampling_params(pb.SamplingParams.FromString(wire)) == EVERY_PARAM


def test_unset_fields_mean_the_defaults():
    assert convert.to_sampling_params(pb.SamplingParams()) == SamplingParams()


def test_a_field_set_to_zero_is_not_the_default():
    assert convert.to_sampling_params(pb.SamplingParams(temperature=0)).temperature == 0


def test_text_is_tokenized_with_special_tokens(tokenizer):
    assert convert.to_request(request(), tokenizer, 300).prompt_ids == (256, 104, 105)


def test_special_tokens_can_be_left_out(tokenizer):
    message = request(add_special_tokens=False)
    assert convert.to_request(message, tokenizer, 300).prompt_ids == (104, 105)


def test_token_ids_need_no_tokenizer():
    message = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 299]))
    assert convert.to_request(message, None, 300).prompt_ids == (1, 299)


def test_chat_goes_through_the_template(tokenizer):
    message = pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")]))
    assert convert.to_request(message, tokenizer, 300).prompt_ids == tuple(tokenizer.encode("<user>hi<answer>"))


def test_request_id_and_priority_are_taken_over(tokenizer):
    made = convert.to_request(request(request_id="mine", priority=-3), tokenizer, 300)
    assert (made.request_id, made.priority) == ("mine", -3)


def test_requests_without_an_id_get_different_ones(tokenizer):
    ids = {convert.to_request(request(), tokenizer, 300).request_id for _ in range(10)}
    assert len(ids) == 10


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (pb.GenerateRequest(), "prompt is missing; set one of text, token_ids, chat"),
        (request(token_ids=pb.TokenIds()), "the prompt has no tokens"),
        (request(token_ids=pb.TokenIds(ids=[1, -7, 300])), r"token_ids[1]=-7 is not in the vocabulary (and 1 more)"),
        (request(chat=pb.Chat()), "chat has no messages"),
        (request(chat=pb.Chat(messages=[pb.ChatMessage(content="x")])), "chat.messages[0] has no role"),
        (request(token_ids=pb.TokenIds(ids=[1]), add_special_tokens=True), "this one is token_ids"),
        (request(request_id=""), "request_id='' of 0 characters"),
        (request(request_id="x" * 129), "of 129 characters"),
        (request(request_id="a\nb"), "printable ASCII"),
        (request(params=pb.SamplingParams(top_p=1.5)), "top_p=1.5"),
        (request(params=pb.SamplingParams(max_tokens=-4)), "max_tokens=-4"),
    ],
)
def test_a_refusal_names_value_and_rule(message, text, tokenizer):
    assert text in problems(message, tokenizer)


def test_text_for_a_model_without_tokenizer_is_refused():
    assert "prompt is text, but the model has no tokenizer; send token_ids" in problems(request(), None)


def test_all_problems_come_in_one_message(tokenizer):
    params = pb.SamplingParams(top_p=1.5, n=65, temperature=-1)
    message = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[300]), params=params, request_id="")
    text = problems(message, tokenizer)
    assert all(value in text for value in ("top_p=1.5", "n=65", "temperature=-1", "token_ids[0]=300", "request_id=''"))


@pytest.mark.parametrize("place", ["GenerateRequest", "SamplingParams", "ChatMessage"])
def test_fields_of_a_newer_client_are_refused(place, tokenizer):
    newer = b"\xa8\x06\x05"  # field 101, a varint of 5
    message = pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")]))
    target = {"GenerateRequest": message, "SamplingParams": message.params, "ChatMessage": message.chat.messages[0]}
    target[place].MergeFromString(newer)
    message.params.SetInParent()
    received = pb.GenerateRequest.FromString(message.SerializeToString())
    assert f"{place} has a field 101 that this server does not know" in problems(received, tokenizer)


def test_consecutive_events_of_a_sample_become_one_chunk():
    events = [TokenEvent("r", 0, [1], "a"), TokenEvent("r", 1, [5], "x"), TokenEvent("r", 0, [2, 3], "bc")]
    first, second = (message.chunk for message in convert.Responses().messages(events))
    assert (first.index, list(first.token_ids), first.text) == (0, [1, 2, 3], "abc")
    assert (second.index, list(second.token_ids), second.text) == (1, [5], "x")


def test_an_event_without_news_becomes_no_message():
    assert convert.Responses().messages([TokenEvent("r", 0, [], "")]) == []


def test_events_survive_the_round_trip():
    entry = TokenLogprobs(4, -0.5, 2, [(9, -0.25), (4, -0.5)])
    events = [
        TokenEvent("r", 0, [4], "d", logprobs=[entry], prompt_logprobs=[None, entry]),
        TokenEvent("r", 1, [], "", finish_reason=FinishReason.STOP, stop_match="stop!"),
        TokenEvent("r", 0, [], "", finish_reason=FinishReason.STOP, stop_match=0, usage=Usage(5, 2, 9)),
    ]
    messages = convert.Responses().messages(events)
    received = [event for message in messages for event in convert.from_response(message, "r")]
    by_index = [received[0], received[2], received[1]]
    assert by_index[0] == events[0]
    assert by_index[1].stop_match == "stop!"
    assert by_index[2].stop_match == 0
    assert received[-1].usage == Usage(5, 2, 9)


@pytest.mark.parametrize("reason", FinishReason)
def test_every_finish_reason_survives_the_round_trip(reason):
    event = TokenEvent("r", 0, [], "", finish_reason=reason, usage=Usage(1, 0, 0))
    (message,) = convert.Responses().messages([event])
    assert [e.finish_reason for e in convert.from_response(message, "r")] == [reason]


def test_once_says_the_same_as_the_stream():
    responses = convert.Responses()
    messages = responses.messages([TokenEvent("r", 0, [1], "a"), TokenEvent("r", 1, [2], "b")])
    messages += responses.messages(
        [
            TokenEvent("r", 1, [3], "c", finish_reason=FinishReason.LENGTH),
            TokenEvent("r", 0, [4], "d", finish_reason=FinishReason.STOP, stop_match=4, usage=Usage(1, 0, 4)),
        ]
    )
    once = convert.to_once(messages)
    assert [(list(o.token_ids), o.text) for o in once.outputs] == [([1, 4], "ad"), ([2, 3], "bc")]
    assert (once.outputs[0].outcome.stop_token_id, once.usage.num_output_tokens) == (4, 4)


def test_a_prompt_of_something_else_is_refused_by_the_client():
    with pytest.raises(RequestError, match="a prompt holds dict; give text, token ids or"):
        convert.to_message([{"role": "user"}], None, None, 0, None)
