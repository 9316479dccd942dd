import json

from torchinfer.cli import main


def test_client_streams_text_to_stdout(serve, fake_engine, capsys):
    server = serve(fake_engine())
    assert main(["client", "--target", server.target, "--prompt", "abc", "--max-tokens", "7"]) == 0
    assert capsys.readouterr().out == "abcabc"[:5] + "\n"


def test_client_json_has_a_line_for_each_sample(serve, fake_engine, capsys):
    server = serve(fake_engine())
    argv = ["client", "--target", server.target, "--prompt", "abc", "--prompt", "d", "--n", "2", "--json"]
    assert main([*argv, "--max-tokens", "4"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["prompt"], line["index"], line["text"]) for line in lines] == [
        ("abc", 0, "abc"),
        ("abc", 1, "abc"),
        ("d", 0, "dd"),
        ("d", 1, "dd"),
    ]


def test_client_chat_goes_through_the_template(serve, fake_engine, capsys):
    engine = fake_engine()
    server = serve(engine)
    assert main(["client", "--target", server.target, "--prompt", "hi", "--chat", "--max-tokens", "2"]) == 0
    assert bytes(engine.requests[0].prompt_ids[1:]) == b"<user>hi<answer>"


def test_client_tells_the_servers_refusal(serve, fake_engine, capsys):
    server = serve(fake_engine(capacity=0))
    assert main(["client", "--target", server.target, "--prompt", "abc"]) == 1
    assert "torchinfer: error: the queue is full: 0 requests wait" in capsys.readouterr().err


def test_client_reports_an_engine_that_fails_and_exits_with_1(serve, fake_engine, capsys):
    server = serve(fake_engine(fail_after_tokens=3))
    assert main(["client", "--target", server.target, "--prompt", "abc"]) == 1
    printed = capsys.readouterr()
    assert "step 7 ran out of memory" in printed.err
    assert printed.out.startswith("ab")
