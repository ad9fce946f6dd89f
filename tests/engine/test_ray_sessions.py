"""Whose Ray it is: engines that share a process, a host that shuts Ray down, and a process that forks."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import ray

from remask.scheduler.errors import Unavailable
from remask.workers.executors.ray_session import RaySession

pytestmark = [pytest.mark.ray, pytest.mark.slow]

OURS = """
import gc, json, os, ray
from pathlib import Path
from remask import LLM, EngineDead, Unavailable
def engine():
    return LLM("tiny", device="cpu", distributed_executor_backend="ray", max_num_rows=512)
def text(llm):
    return llm.generate("123+456=", {"max_tokens": 8})[0].outputs[0].text
facts = {}
ray.init(include_dashboard=False, log_to_driver=False)  # Ray sets variables of its own when it first starts
ray.shutdown()
before = dict(os.environ)
first, second = engine(), engine()
facts["texts"] = [text(first), text(second)]
facts["environment"] = dict(os.environ) == before
first.close()
first.close()
facts["after the first was closed"] = [ray.is_initialized(), text(second)]
child = os.fork()
if child == 0:
    try:
        engine()
    except Unavailable as error:
        Path("child.txt").write_text(str(error))
    second.engine._engine.executor.close()
    del first, second
    gc.collect()
    os._exit(0)
os.waitpid(child, 0)
facts["child"] = Path("child.txt").read_text()
facts["after the fork"] = [ray.is_initialized(), text(second), second.engine._engine.executor.workers]
second.close()
facts["after the last was closed"] = ray.is_initialized()
try:
    second.scale(2)
except EngineDead as error:
    facts["scale"] = str(error)
print(json.dumps(facts))
"""

HANGS = 77  # exit status if Ray's wait does not return
THE_HOSTS = (
    f"HANGS = {HANGS}"
    + """
import json, os, ray, threading, time
from remask import LLM
from remask.workers.executors import ray_session
from remask.workers.executors.ray_session import RaySession
def engine():
    return LLM("tiny", device="cpu", distributed_executor_backend="ray", max_num_rows=512)
def error_of(call, *args):
    try:
        call(*args)
    except Exception as error:
        return [type(error).__name__, str(error)]
def living():
    return ray.util.list_named_actors()
facts, prompt = {}, ["123+456=", {"max_tokens": 8}]
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
@ray.remote(num_cpus=0)
def sleeps():
    time.sleep(60)
bare = RaySession()
inner, outer = RaySession(), RaySession()
with ray_session._lock:  # as if the garbage collector closed an engine while another is made
    inner.close()
outer.close()
facts["after closes"] = [ray.is_initialized(), sum(ray_session._num_engines.values())]
busy, later = engine(), engine()
busy.generate(*prompt)
many, heard = [["123+456="] * 500, {"max_tokens": 200, "unmask": "schedule"}], []
waiter = threading.Thread(target=lambda: heard.append(error_of(busy.generate, *many)))
waits, real_wait, never = threading.Event(), ray.wait, sleeps.remote()
def wait(*args, **options):  # Ray ends a process if a call begins during a shutdown
    waits.set()
    return real_wait([never], timeout=60)
waiter.start()
time.sleep(1)
ray.wait = wait
assert waits.wait(60)
time.sleep(0.05)  # Ray's wait looks once a second whether the process ends, and may hang if that is too early
ray.shutdown()
waiter.join(10)
if waiter.is_alive():
    os._exit(HANGS)
ray.wait = real_wait
facts["busy"] = heard[0]
facts["generate"] = error_of(busy.generate, *prompt)
facts["scale"] = error_of(busy.scale, 2)
busy.close()
facts["after the shutdown"] = ray.is_initialized()

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
@ray.remote(num_cpus=0)
class Own:
    def answer(self):
        return "there"
own = Own.options(name="own").remote()
facts["later: session"] = error_of(bare.check)
facts["later: event"] = error_of(later.engine._engine.executor.next_event, 0)
facts["later: generate"] = error_of(later.generate, *prompt)
facts["later: scale"] = error_of(later.scale, 2)
later.close()
bare.close()
facts["the new Ray"] = [ray.get(own.answer.remote()), living(), ray.is_initialized()]
print(json.dumps(facts))
"""
)


def facts_of(code: str, folder: Path) -> dict[str, Any]:
    """What the code prints."""
    command = [sys.executable, "-c", code]
    for _ in range(4):
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=130)
        if done.returncode != HANGS:
            break
        # The native wait of a thread never returns if the shutdown of another one overtakes it at the wrong
        # moment, which a busy machine makes likelier.
        warnings.warn("Ray's wait has not returned after its shutdown; trying again", stacklevel=1)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return facts_of(OURS, tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def the_hosts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return facts_of(THE_HOSTS, tmp_path_factory.mktemp("hosts"))


def test_an_engine_starts_ray_if_needed_and_leaves_the_environment_alone(ours: dict[str, Any]) -> None:
    assert ours["texts"] == ["0579", "0579"]
    assert ours["environment"], "the host's environment is its own"


def test_ray_ends_with_the_last_engine(ours: dict[str, Any]) -> None:
    assert ours["after the first was closed"] == [True, "0579"]
    assert ours["after the last was closed"] is False
    assert ours["scale"].startswith("the engine was closed; make a new")


def test_a_forked_process_that_drops_an_engine_ends_nothing(ours: dict[str, Any]) -> None:
    assert ours["after the fork"] == [True, "0579", [0]], "by the worker that it had"


def test_a_forked_process_is_told_that_ray_does_not_work_there(ours: dict[str, Any]) -> None:
    assert "Ray does not survive a fork" in ours["child"]
    assert "spawn" in ours["child"]


def test_a_ray_that_the_host_started_outlives_the_engines(the_hosts: dict[str, Any]) -> None:
    assert the_hosts["after closes"] == [True, 1]


@pytest.mark.parametrize("where", ["busy", "generate", "scale"])
def test_after_the_hosts_shutdown_an_engine_is_dead_by_name(the_hosts: dict[str, Any], where: str) -> None:
    kind, message = the_hosts[where]
    assert (kind, "Ray was shut down" in message, "make a new LLM" in message) == ("EngineDead", True, True)


def test_after_the_hosts_shutdown_nothing_starts_another_ray(the_hosts: dict[str, Any]) -> None:
    assert the_hosts["after the shutdown"] is False


@pytest.mark.parametrize("where", ["later: session", "later: event", "later: generate", "later: scale"])
def test_an_engine_stays_dead_when_the_host_starts_another_ray(the_hosts: dict[str, Any], where: str) -> None:
    kind, message = the_hosts[where]
    assert (kind, "Ray was shut down" in message) == ("EngineDead", True)


def test_a_dead_engine_leaves_the_next_ray_alone(the_hosts: dict[str, Any]) -> None:
    assert the_hosts["the new Ray"] == ["there", ["own"], True]


def test_a_ray_that_does_not_start_is_unavailable_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ray.init

    def init(**options: Any) -> None:
        real(**options)
        raise ConnectionError("half way")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(Unavailable, match="Ray cannot be started: ConnectionError: half way"):
        RaySession()
    assert not ray.is_initialized()
