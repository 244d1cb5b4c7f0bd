import os
import signal

from sft_dist.limits import StopRequest, Verdict


def test_a_signal_sets_a_flag_and_nothing_else():
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        for number in previous:
            stop = StopRequest()
            stop.install()
            os.kill(os.getpid(), number)
            assert stop.is_wanted()
            assert stop.cause == signal.Signals(number).name
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def test_a_stop_file_is_a_wish(tmp_path):
    stop = StopRequest(tmp_path / "stop")
    assert not stop.is_wanted()
    (tmp_path / "stop").write_text("SIGINT\n")
    assert stop.is_wanted()
    assert stop.cause == "SIGINT"


def test_a_verdict_comes_back_as_it_was_written(tmp_path):
    verdict = Verdict("42-1", "stopped", 17, "asked to stop by SIGTERM")
    verdict.write(tmp_path / "verdicts")
    assert Verdict.read(tmp_path / "verdicts", "42-1") == verdict
    assert Verdict.read(tmp_path / "verdicts", "42-2") is None
    assert [path.name for path in (tmp_path / "verdicts").iterdir()] == ["42-1.json"]
