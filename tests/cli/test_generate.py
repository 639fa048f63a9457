"""`seawall generate` and `seawall bench-model`, as a person types them and as a script pipes them."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys

import jsonschema
import pytest

from seawall.cli import main
from seawall.cli.screen import Screen
from seawall.inference import Decoder
from seawall.inference.generate.sequence import Sequence
from tests.inference import tiny

ESCAPE = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """One for all tests, so that the tiny model is converted once."""
    folder = tmp_path_factory.getbasetemp() / "generate-cache"
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("SEAWALL_CACHE", str(folder))


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    return str(tiny.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf"))


@pytest.fixture
def on(gguf):
    return ["--model", gguf, "--context", "100", "--threads", "1"]


def typed(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def expected(gguf, text, *, raw=False, **settings):
    with Decoder.load(gguf, context=100, threads=1) as decoder:
        prompt = decoder.encode(text) if raw else decoder.encode_chat(text)
        with decoder.start(prompt, **{"max_tokens": 20, **settings}) as answer:
            return "".join(step.text for step in answer)


def test_a_pipe_gets_the_answer_a_newline_and_nothing_else(capsys, on, gguf):
    assert main(["generate", "abcd", "--max-tokens", "20", *on]) == 0
    captured = capsys.readouterr()
    assert captured.out == expected(gguf, "abcd") + "\n"
    assert captured.err == ""


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_the_prompt_may_come_on_standard_input(capsys, monkeypatch, on, gguf, arguments):
    typed(monkeypatch, b"abab cd\n")
    assert main(["generate", *arguments, "--max-tokens", "20", *on]) == 0
    assert capsys.readouterr().out == expected(gguf, "abab cd\n") + "\n"


def test_an_argument_leaves_standard_input_alone(capsys, monkeypatch, on, gguf):
    typed(monkeypatch, b"something else")
    assert main(["generate", "abcd", "--raw", "--max-tokens", "20", *on]) == 0
    assert capsys.readouterr().out == expected(gguf, "abcd", raw=True) + "\n"
    assert sys.stdin.buffer.read() == b"something else"


def test_a_seed_repeats_a_drawn_answer(capsys, on):
    def drawn(seed):
        assert main(["generate", "abcd", "--temperature", "1.5", "--seed", seed, "--max-tokens", "30", *on]) == 0
        return capsys.readouterr().out

    assert drawn("3") == drawn("3") != drawn("4")


def test_an_answer_stops_before_a_stop_text(capsys, on, gguf):
    whole = expected(gguf, "abcd")
    assert main(["generate", "abcd", "--max-tokens", "20", "--stop", whole[3:5], *on]) == 0
    assert capsys.readouterr().out == whole[: whole.index(whole[3:5])] + "\n"


def test_a_choice_and_a_regex_shape_the_answer(capsys, on):
    assert main(["generate", "ab", "--choice", "cab", "--choice", "dad", *on]) == 0
    assert capsys.readouterr().out in ("cab\n", "dad\n")
    assert main(["generate", "ab", "--regex", "[abc]{4} [fgh]{2}", *on]) == 0
    assert re.fullmatch(r"[abc]{4} [fgh]{2}\n", capsys.readouterr().out)


def test_a_constrained_answer_that_is_cut_fails_and_says_so(capsys, on):
    assert main(["generate", "ab", "--regex", "[abc]{40}", "--max-tokens", "10", *on]) == 1
    assert capsys.readouterr().err == (
        "seawall: the answer is incomplete: it was cut at its limit of tokens; raise --max-tokens\n"
    )


WRONG = [
    (["generate", "ab", "--temperature", "-1"], "temperature must be from"),
    (["generate", "ab", "--max-tokens", "0"], "max_tokens must be a whole number of at least 1, got 0"),
    (["generate", "ab", "--regex", "(a"], "unclosed group"),
    (["generate", ""], "the prompt is empty"),
    (["generate", "ab", "--json-schema", "nowhere.json"], "nowhere.json"),
    (["generate", "ab", "--precision", "int9"], "unknown precision 'int9'"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_what_is_wrong_is_one_line(capsys, on, arguments, message):
    assert main([*arguments, *on]) == 1
    error = capsys.readouterr().err
    assert error.startswith("seawall: ")
    assert message in error
    assert error.count("\n") == 1


def test_bytes_that_are_no_text_are_refused(capsys, monkeypatch, on):
    typed(monkeypatch, b"\xff\xfe")
    assert main(["generate", *on]) == 1
    assert "no text in UTF-8: invalid start byte at byte 0" in capsys.readouterr().err


def test_on_a_terminal_without_a_prompt_it_does_not_wait_for_one(capsys, monkeypatch, on):
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    assert main(["generate", *on]) == 1
    assert "there is no prompt" in capsys.readouterr().err


def test_two_forms_at_once_are_wrong_usage(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["generate", "a", "--regex", "a", "--choice", "b"])
    assert caught.value.code == 2


def test_ctrl_c_ends_with_130_and_what_was_written_stays(capsys, monkeypatch, on, gguf):
    real, steps, closed = Sequence.step, [], []

    def step(self):
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Sequence, "step", step)
    monkeypatch.setattr(Decoder, "close", lambda self, close=Decoder.close: (closed.append(1), close(self)))
    assert main(["generate", "abcd", "--max-tokens", "20", *on]) == 128 + signal.SIGINT
    monkeypatch.undo()
    captured = capsys.readouterr()
    assert captured.out
    assert captured.err == "\n"
    assert closed == [1]


def command(*arguments):
    code = "import sys; from seawall.cli import main; sys.exit(main())"
    return [sys.executable, "-W", "error", "-c", code, *arguments]


def test_a_reader_that_leaves_ends_it_in_silence(on, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command("generate", "abcd", *on), stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_on_a_terminal_a_live_line_tells_the_rate_and_a_last_one_the_whole(on, gguf):
    """A real terminal: rows that are full stay, the line of progress goes."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "40", "LINES": "20"}
    with subprocess.Popen(
        command("generate", "abcd", "--max-tokens", "60", *on), stdin=follower, stdout=follower, stderr=follower,
        env=environment,
    ) as process:  # fmt: skip
        os.close(follower)
        seen = b""
        while True:
            try:
                part = os.read(leader, 65536)
            except OSError:
                break
            if not part:
                break
            seen += part
    os.close(leader)
    assert process.returncode == 0
    lines = [line for line in ESCAPE.sub(b"", seen).decode().replace("\r", "\n").split("\n") if line]
    last = next(number for number, line in enumerate(lines) if "the first after" in line)
    assert re.match(r"\d+ tokens(, cut at its limit)?; the first after [\d.]+ s", lines[last])
    assert expected(gguf, "abcd", max_tokens=60).split()[-1] in lines[last - 1]
    assert any(re.fullmatch(r"\d+ of \d+ tokens read", line) or "tokens/s" in line for line in lines[:last])


class Shown:
    """A console and a live line that remember."""

    def __init__(self, width):
        self.width, self.rows, self.console = width, [], self

    def print(self, row, **settings):
        self.rows.append(row)

    def update(self, *settings, **more):
        pass


def screen(width):
    made = Screen()
    made._live, made._row, made._shown_at, made._terminal = Shown(width), "", 0.0, True
    return made


def test_full_rows_are_cut_between_words_and_nothing_is_lost():
    shown = screen(20)
    text = "The sea is salty because rivers carry salt into it.\n\n"
    text += "Averyveryverylongwordthatfillsmore 海水很咸因为河流把盐带进海里"
    for index in range(0, len(text), 3):
        shown.write(text[index : index + 3])
    rows = [*shown._live.rows, shown._row]
    assert rows[:4] == ["The sea is salty", "because rivers carry", "salt into it.", ""]
    assert "".join("".join(rows).split()) == "".join(text.split())


def test_what_a_model_writes_cannot_steer_the_terminal():
    shown = screen(80)
    shown.write("a\x1b[2Jb\x07\x9bc\rd")
    assert shown._row == "a␛[2Jb␇�c␍d"


def test_the_bench_prints_a_table_or_json_with_the_samples(capsys, gguf, tmp_path):
    arguments = ["bench-model", gguf, "--context", "100", "--threads", "1", "--rounds", "2", "--tokens", "8"]
    assert main([*arguments, "--prompt-tokens", "20", "--json", str(tmp_path / "bench.json")]) == 0
    table = capsys.readouterr().out
    results = json.loads((tmp_path / "bench.json").read_text())
    figures = results["figures"]
    assert results["prompt_tokens"] == 20
    assert figures["prefill_tok_s"] == pytest.approx(20 / figures["ttft_s"], rel=0.5)
    assert {len(values) for values in results["samples"].values()} == {2}
    assert figures["chat_speedup"] > 0
    assert "medians of 2 rounds" in table
    assert re.search(r"prefill +[\d,]+ tokens/s", table)
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"].keys() == figures.keys()


@pytest.mark.model
def test_the_bundled_model_answers_in_json_that_validates(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("SEAWALL_CACHE")
    schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
    schema["additionalProperties"] = False
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    question = "Anna lives in Berlin. Where does she live? Answer in JSON."
    assert main(["generate", question, "--json-schema", str(tmp_path / "schema.json")]) == 0
    jsonschema.validate(json.loads(capsys.readouterr().out), schema)
