"""Who is missing, as seen through the store where processes meet; no process is started here."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from robustkit.cli.main import main
from robustkit.core import processes
from robustkit.core.errors import UserError
from robustkit.core.processes import End, Lost, Meeting, Noticeboard, exchange, timeout


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.TCPStore]:
    """A store that others find by the environment, with processes that beat quickly."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setattr(processes, "BEAT", 0.1)
    monkeypatch.setattr(processes, "LOOK", 0.5)
    yield server


@pytest.fixture
def three(store: dist.TCPStore) -> Iterator[list[Meeting]]:
    found = [Meeting(rank, 3) for rank in range(3)]
    yield found
    for meeting in found:
        meeting.close()


def test_the_first_notice_stays(store: dist.TCPStore) -> None:
    mine, theirs = Noticeboard(), Noticeboard(store)
    assert mine.read() is None
    assert mine.write(End(2, "batch_size: too small", 1))
    assert not theirs.write(End(1, "something else"))
    assert mine.read() == theirs.read() == End(2, "batch_size: too small", 1)


def test_all_there(three: list[Meeting]) -> None:
    assert three[0].look(0.0) is None


def test_a_notice_ends_the_looking(three: list[Meeting], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LOOK", 60.0)
    three[2].board.write(End(1, "process 2 of 3: no space left", 2))
    began = time.monotonic()
    assert three[0].look(0.0) == End(1, "process 2 of 3: no space left", 2)
    assert time.monotonic() - began < 5


def test_who_gives_no_sign_of_life_is_named(three: list[Meeting]) -> None:
    three[1].close()
    end = three[0].look(0.0)
    assert end is not None
    assert (end.code, end.rank) == (1, 1)
    assert end.text.startswith("process 1 of 3 gives no sign of life")


def test_who_does_not_come_is_named(three: list[Meeting], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUSTKIT_TIMEOUT", "7")
    three[0].begun = three[1].begun = 5
    three[2].begun = 4
    end = three[1].look(7.0)
    assert end is not None
    assert end.rank == 2
    assert end.text.startswith("process 2 of 3 did not come to an exchange within 7 s")


@pytest.fixture
def ends(three: list[Meeting], monkeypatch: pytest.MonkeyPatch) -> list[End]:
    """With which the processes would have ended that wait no longer than a second for the others."""
    found: list[End] = []
    monkeypatch.setattr(processes, "SILENCE", 1.0)
    monkeypatch.setattr(processes, "end", found.append)
    return found


def until(ends: list[End]) -> None:
    deadline = time.monotonic() + 20
    while not ends and time.monotonic() < deadline:
        time.sleep(0.05)


def silenced(meeting: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if its machine had lost its network: the store does not answer it any more, and nothing breaks."""
    monkeypatch.setattr(meeting, "_count", lambda *_: time.sleep(5) or 0)


def test_a_process_that_falls_silent_is_missed(
    three: list[Meeting], ends: list[End], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the next one, without any exchange that fails."""
    monkeypatch.setattr(three[1]._over, "wait", lambda timeout: time.sleep(10))
    until(ends)
    assert ends[0].text.startswith("process 1 of 3 gives no sign of life")
    assert (ends[0].code, ends[0].rank) == (1, 1)


def test_who_loses_the_others_ends(three: list[Meeting], ends: list[End], monkeypatch: pytest.MonkeyPatch) -> None:
    silenced(three[2], monkeypatch)
    until(ends)
    assert "process 0 of 3 does not answer" in {end.text.partition(":")[0] for end in ends}


def test_who_leaves_in_order_is_not_missed(three: list[Meeting], ends: list[End]) -> None:
    three[1].close()
    time.sleep(3)
    assert ends == []


def test_a_notice_ends_the_others(three: list[Meeting], ends: list[End]) -> None:
    """Though they wait in an exchange that does not fail."""
    three[1].board.write(End(75, "", 1))
    until(ends)
    assert ends[0] == End(75, "", 1)


def test_who_was_stopped_itself_misses_nobody(
    three: list[Meeting], ends: list[End], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [meeting._answered for meeting in three]
    monkeypatch.setattr(time, "monotonic", lambda clock=time.monotonic: clock() + 3600)
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        time.sleep(0.05)
    assert ends == []
    assert all(meeting._answered > then + 3600 for meeting, then in zip(three, held, strict=True))


def test_a_store_that_went_with_its_keeper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LOOK", 2.0)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    meeting = Meeting(1, 2)
    del server
    end = meeting.look(0.0)
    meeting.close()
    assert end is not None
    assert end.text.startswith("process 0 of 2 is gone")


def test_only_failures_with_somebody_missing_are_losses(three: list[Meeting], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(processes, "_meeting", three[0])
    with pytest.raises(RuntimeError, match="shapes differ"):
        exchange(broken)
    three[2].close()
    with pytest.raises(Lost, match="process 2 of 3"):
        exchange(broken)


@pytest.mark.parametrize("text", ["", "0", "-5", "5m", "1.5"])
def test_timeout_is_whole_seconds(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUSTKIT_TIMEOUT", text)
    with pytest.raises(UserError, match="ROBUSTKIT_TIMEOUT: must be a whole number of seconds"):
        timeout()


@pytest.mark.parametrize(
    ("words", "environment", "expected"),
    [
        (("--processes", "0"), {}, "--processes: must be a whole number of at least 1, got '0'"),
        (("--processes", "two"), {}, "--processes: must be a whole number of at least 1, got 'two'"),
        (("--processes", "3"), {}, "--processes: 3 processes, but 2 GPUs; one for each GPU at most, or --device cpu"),
        (("--processes", "2", "--device", "cuda:1"), {}, "--device: 'cuda:1' is not for several processes"),
        (("--processes", "2", "--device", "mps"), {}, "--device: 'mps' is not for several processes"),
        (("--processes", "4"), {"WORLD_SIZE": "2"}, "4 processes are asked for, but another launcher has started 2"),
    ],
)
def test_mistakes(
    words: tuple[str, ...],
    environment: dict[str, str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["run", "recipe.py", *words]) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1
