"""Good requests share the engine with extreme and with failing ones, and their results do not change.

The whole mix is 200 good requests, 50 legal ones with extreme fields, 50 that raise, exceed the memory or
hold NaN, and 10 that kill their worker; it runs in the long tier. A tenth of it runs in the slow tier.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from remask.embedded import model_directory

pytestmark = pytest.mark.slow

HOSTILE = Path(__file__).parents[1] / "data" / "hostile"
V, POISON = 259, 200  # ids; the one whose embedding is not a number
LONG_STOPS = [chr(ord("A") + i) * 256 for i in range(16)]
Ask = tuple[list[int], dict[str, Any]]
Output = dict[str, Any]

GOOD: tuple[dict[str, Any], ...] = (
    {"unmask": "schedule"},
    {"unmask": "threshold:0.9"},
    {"unmask": "threshold:0.5", "temperature": 0.9},
    {"unmask": "capped_threshold:0.6", "remask": "wino:0.9", "temperature": 0.7},
    {"remask": "saber", "temperature": 1.0},
    {"unmask": "dream:alg=origin", "temperature": 1.0},
    {"unmask": "entropy_bound:1.0", "cfg_scale": 0.5},
    {"unmask": "schedule:score=margin", "temperature": 1.0, "top_p": 0.8},
    {"unmask": "schedule", "remask": "rcr", "temperature": 1.0},
    {"remask": "remdm", "temperature": 1.0, "min_p": 0.05},
    {"unmask": "raise_late:1000000"},  # of a kind that fails elsewhere
    {"unmask": "bernoulli:2.0", "remask": "low_prob:0.3", "temperature": 1.0},
)
# Each extreme in what it costs those beside it.
ANY_TEMPERATURE: dict[str, Any] = {"temperature": 1.0, "bad_token_ids": [POISON]}
LEGAL: tuple[dict[str, Any], ...] = (
    {"max_tokens": 480, "block_length": 480},
    {"max_tokens": 240, "trace": True, "logprobs": 1},
    {"block_length": 1, "stop": LONG_STOPS},
    {"n": 12, **ANY_TEMPERATURE},
    {"unmask": "capped_threshold:0.3", "remask": "oracle_loo:0.9", "block_length": 8},
    {"logit_bias": {i: -100.0 + i / 2 for i in range(POISON)}},
    {"cfg_scale": 100.0, "bad_token_ids": [POISON]},
    {"stop_token_ids": [3] * 100_000, "block_length": 1},
    {"allowed_token_ids": [20] * 100_000},
    {"bad_token_ids": [i for i in range(V) if i not in (0, 20)]},
    {"temperature": 100.0, "bad_token_ids": [POISON], "rank": "top"},
    {"top_p": 1e-9, **ANY_TEMPERATURE},
    {"top_k": 2**31 - 1, "min_p": 1.0, **ANY_TEMPERATURE},
    {"unmask": "capped_threshold:0.3", "remask": "wino:t2=1.0,ban_old=true", "trace": True},
    {"unmask": "entropy_bound:0.001", "suppress_eos": True, "suppress_eos_confidence": True},
    {"unmask": "schedule:steps=8", "remask": "rcr:entropy", "seed": 2**63 - 1, **ANY_TEMPERATURE},
)
# What fails, the error's class and status, and what it says.
FAILING: tuple[tuple[dict[str, Any], str, int, str], ...] = (
    ({"unmask": "raise_value"}, "RequestFailed", 500, "ValueError: a kernel raised"),
    ({"unmask": "exceed_memory"}, "RequestTooLarge", 413, ""),
    ({"prompt": "NaN"}, "RequestFailed", 500, "not numbers"),
    ({"unmask": "raise_late"}, "RequestFailed", 500, "IndexError: too late"),
    ({"unmask": "exceed_tables", "block_length": 5}, "RequestTooLarge", 413, ""),
    ({"unmask": "raise_zero"}, "RequestFailed", 500, "ZeroDivisionError"),
    ({"unmask": "exceed_host_memory"}, "RequestTooLarge", 413, ""),
    ({"unmask": "threshold", "remask": "forgetful"}, "RequestFailed", 500, "KeyError"),
    ({"prompt": "NaN", "remask": "saber", "temperature": 1.0}, "RequestFailed", 500, "not numbers"),
    ({"unmask": "raise_mute"}, "RequestFailed", 500, "MuteError"),
    ({"unmask": "unready", "block_length": 5}, "RequestFailed", 500, "KeyError"),
    ({"unmask": "raise_unsendable"}, "RequestFailed", 500, "OSError"),
    ({"unmask": "shapeless", "n": 2, "temperature": 1.0}, "RequestFailed", 500, "shape mismatch"),
    ({"unmask": "idle"}, "RequestFailed", 500, "committed nothing"),
)


class Mix:
    """A mix of requests; `places[kind]` are the indices of that kind's requests in `asks`."""

    def __init__(self, share: int) -> None:
        self.asks: list[Ask] = []
        self.most = 64 if share == 1 else 24  # tokens of a good canvas
        self.places: dict[str, list[int]] = {}
        rng = random.Random(0)
        counts = {"good": 200 // share, "legal": 50 // share, "failing": 50 // share, "killing": 10 // share}
        counts["legal"] = max(counts["legal"], len(LEGAL))
        counts["failing"] = max(counts["failing"], len(FAILING))
        for kind, count in counts.items():
            made = [getattr(self, f"_{kind}")(i, rng) for i in range(count)]
            self.places[kind] = list(range(len(self.asks), len(self.asks) + count))
            self.asks += made

    def shuffled(self, *kinds: str) -> list[int]:
        """The indices of all requests of these kinds, shuffled."""
        places = [place for kind in kinds for place in self.places[kind]]
        random.Random(1).shuffle(places)
        return places

    @staticmethod
    def _prompt(rng: random.Random, most: int = 24) -> list[int]:
        return [rng.randrange(20, 82) for _ in range(rng.randint(4, most))]

    def _good(self, i: int, rng: random.Random) -> Ask:
        return self._prompt(rng), {"max_tokens": rng.randint(8, self.most), "seed": i, **GOOD[i % len(GOOD)]}

    def _legal(self, i: int, rng: random.Random) -> Ask:
        own = LEGAL[i % len(LEGAL)]
        return [20] * 32, {
            "max_tokens": 32,
            "unmask": "schedule:steps=8",
            "seed": i,
            "ignore_eos": True,
            **own,
        }

    def _failing(self, i: int, rng: random.Random) -> Ask:
        fields, *_ = FAILING[i % len(FAILING)]
        own, prompt = dict(fields), self._prompt(rng)
        if own.pop("prompt", None):
            prompt[2] = POISON
        return prompt, {"max_tokens": rng.randint(8, 64), "seed": i, **own}

    def _killing(self, i: int, rng: random.Random) -> Ask:
        return self._prompt(rng), {"max_tokens": 8, "unmask": "kill", "seed": i}


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model; prompts that hold `POISON` have logits that are not numbers."""
    target = tmp_path_factory.mktemp("poisoned")
    with model_directory("tiny") as tiny:
        shutil.copytree(tiny, target, dirs_exist_ok=True)
        weights = load_file(tiny / "model.safetensors")
    weights["model.transformer.wte.weight"][POISON] = float("nan")
    save_file(weights, target / "model.safetensors")
    return target


def run(directory: Path, model: Path, mix: Mix, *engines: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of each engine. An engine's `runs` are pairs of a name and indices of requests."""
    plan, output = directory / "plan.json", directory / "output.json"
    shared = {"model": str(model), "asks": mix.asks}
    plan.write_text(json.dumps([{**shared, **engine} for engine in engines]))
    paths = filter(None, [str(HOSTILE), os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([sys.executable, HOSTILE / "run_mixes.py", plan, output], check=True, env=environment)
    return json.loads(output.read_text())


@pytest.fixture(
    scope="module", params=[10, pytest.param(1, marks=pytest.mark.long)], ids=["a tenth", "whole"]
)
def mix(request: pytest.FixtureRequest) -> Mix:
    return Mix(request.param)


MIXED = ("good", "legal", "failing")
OPTIONS = {"max_num_rows": 1024}
ON_RAY = {"distributed_executor_backend": "ray", "data_parallel_size": 2}


@pytest.fixture(scope="module")
def in_process(mix: Mix, poisoned: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Any]:
    """Results of the good requests alone and of the mix, in one process, by `batch_invariant`."""
    runs = [("alone", mix.shuffled("good")), ("mixed", mix.shuffled(*MIXED))]
    engines = [
        {"options": {**OPTIONS, "batch_invariant": invariant}, "runs": runs} for invariant in (False, True)
    ]
    found = run(tmp_path_factory.mktemp("in_process"), poisoned, mix, *engines)
    return dict(zip((False, True), found, strict=True))


def on_ray(mix: Mix, poisoned: Path, directory: Path, *runs: tuple[str, ...]) -> list[dict[str, Any]]:
    """Results of two workers on Ray with `batch_invariant=True`; each run has requests of some kinds."""
    options = {**OPTIONS, **ON_RAY, "batch_invariant": True}
    named = [(str(kinds), mix.shuffled(*kinds)) for kinds in runs]
    (found,) = run(directory, poisoned, mix, {"options": options, "runs": named})
    return [found[str(kinds)] for kinds in runs]


def differing(mix: Mix, found: dict[str, Output], expected: dict[str, Output], *, bits: bool) -> list[str]:
    """The good requests whose results differ from the expected ones."""
    wrong = []
    for place in mix.places["good"]:
        ours, theirs = found[str(place)], expected[str(place)]
        tokens = [sample[0] for sample in ours["samples"]]
        is_right = ours == theirs if bits else tokens == [sample[0] for sample in theirs["samples"]]
        if not is_right or ours["error"] != [None, None, None]:
            wrong.append(f"{mix.asks[place][1]}: {ours['error']}")
    return wrong


def wrongly_ended(mix: Mix, found: dict[str, Output]) -> list[str]:
    """The legal requests without an answer, and the failing ones without the error of their kind."""
    wrong = []
    for place in mix.places["legal"]:
        _, params = mix.asks[place]
        if found[str(place)]["error"] != [None, None, None]:
            wrong.append(f"{params}: {found[str(place)]['error']}")
    for i, place in enumerate(mix.places["failing"]):
        fields, kind, status, text = FAILING[i % len(FAILING)]
        ours = found[str(place)]["error"]
        if ours[:2] != [kind, status] or text not in ours[2]:
            wrong.append(f"{fields}: {ours}")
    return wrong


@pytest.mark.parametrize("invariant", [False, True], ids=["default", "batch_invariant"])
def test_a_hostile_mix_changes_no_good_text(mix: Mix, in_process: Any, invariant: bool) -> None:
    alone, mixed = (in_process[invariant][name]["outputs"] for name in ("alone", "mixed"))
    assert differing(mix, alone, alone, bits=True) == [], "the good ones are good"
    assert differing(mix, mixed, alone, bits=invariant) == []


@pytest.mark.parametrize("invariant", [False, True], ids=["default", "batch_invariant"])
def test_all_others_of_a_hostile_mix_end_as_they_must(mix: Mix, in_process: Any, invariant: bool) -> None:
    assert wrongly_ended(mix, in_process[invariant]["mixed"]["outputs"]) == []


@pytest.mark.ray
def test_a_hostile_mix_changes_no_bit_on_two_workers(
    mix: Mix, poisoned: Path, in_process: Any, tmp_path: Path
) -> None:
    (mixed,) = on_ray(mix, poisoned, tmp_path, MIXED)
    found = mixed["outputs"]
    assert differing(mix, found, in_process[True]["alone"]["outputs"], bits=True) == []
    assert wrongly_ended(mix, found) == []


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_requests_that_kill_their_workers_change_no_bit_either(
    mix: Mix, poisoned: Path, in_process: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without, with_them = on_ray(mix, poisoned, tmp_path, MIXED, (*MIXED, "killing"))
    found = with_them["outputs"]
    assert differing(mix, found, in_process[True]["alone"]["outputs"], bits=True) == []
    assert wrongly_ended(mix, found) == []
    for place in mix.places["killing"]:
        assert found[str(place)]["error"][0] == "WorkerDied"
    with capsys.disabled():
        summary = f"{len(mix.places['killing'])} that kill: {with_them['seconds'][0]:.1f} s"
        sys.stdout.write(f"\n{summary}, and {without['seconds'][0]:.1f} s without them\n")


NUM_ROUNDS = 3
MAX_TIMES = 1.3


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("options", "clock"),
    [({}, "cpu_seconds"), pytest.param(ON_RAY, "seconds", marks=pytest.mark.ray)],
    ids=["in process", "on two workers"],
)
def test_failing_requests_cost_the_others_no_time(
    poisoned: Path, tmp_path: Path, options: dict[str, Any], clock: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Failing requests run with the good ones, and with the good and legal ones. Rounds are interleaved."""
    mix, company = Mix(1), [("good",), ("good", "legal")]
    runs = [
        (str(kinds), mix.shuffled(*kinds))
        for _ in range(NUM_ROUNDS)
        for before in company
        for kinds in (before, (*before, "failing"))
    ]
    warm_up = ("warm-up", mix.places["good"][:20])
    (found,) = run(tmp_path, poisoned, mix, {"options": {**OPTIONS, **options}, "runs": [warm_up, *runs]})
    lines = ["| beside | seconds without | and with the failing | times as long, median | least to least |"]
    lines.append("|---" * 5 + "|")
    slow = []
    for before in company:
        without, with_them = (found[str(kinds)][clock] for kinds in (before, (*before, "failing")))
        median = statistics.median(one / other for one, other in zip(with_them, without, strict=True))
        least = min(with_them) / min(without)
        shown = (", ".join(f"{each:.1f}" for each in own) for own in (without, with_them))
        lines.append(f"| {', '.join(before)} | {' | '.join(shown)} | {median:.2f} | {least:.2f} |")
        if min(median, least) > MAX_TIMES:
            slow.append(before)
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(lines) + "\n")
    assert not slow
