"""Applications of Ray Serve: what is refused before anything starts, and what deployments are made of."""

from __future__ import annotations

from typing import Any

import pytest

from remask import InvalidRequest

pytestmark = pytest.mark.slow  # importing Ray Serve takes seconds

ON_RAY = {"distributed_executor_backend": "ray", "data_parallel_size": 3, "device": "cpu"}


def app(**fields: Any) -> Any:
    from remask.ray import build_app

    return build_app({"model": "tiny", **fields})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"modl": 1}, "modl: unknown field; did you mean 'model'"),
        ({"model": None}, "args: "),
        ({"num_cpus": "two"}, "num_cpus"),
        (
            {"engine_kwargs": {"burrst": 1}},
            "engine_kwargs: there is no option 'burrst'; did you mean 'burst'",
        ),
        ({"engine_kwargs": {"burst": 0}}, "burst: "),
        ({"engine_kwargs": {"model": "tiny"}}, "model: is given by model and by engine_kwargs"),
        ({"server_kwargs": {"port": 1}}, "server_kwargs.port: is Serve's"),
        ({"server_kwargs": {"api_kye": []}}, "server_kwargs.api_kye: unknown option; did you mean 'api_key'"),
        ({"server_kwargs": {"api_key": [""]}}, "api_key: is empty"),
        ({"defaults": {"temperature": -1}}, "temperature: "),
        ({"deployment_config": {"num_replcas": 1}}, "deployment_config: "),
        ({"ingress_config": {"max_ongoing_requests": "all"}}, "ingress_config: "),
        (
            {
                "engine_kwargs": ON_RAY,
                "deployment_config": {"placement_group_bundles": [{"CPU": 1}, {"CPU": 2}]},
            },
            "data_parallel_size: .* have room for 2",
        ),
    ],
)
def test_an_invalid_field_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        app(**fields)


def test_no_error_shows_a_key() -> None:
    for fields in ({"api_key": "secret"}, {"api_kye": ["secret"]}, {"api_key": ["secret", " x"]}):
        with pytest.raises(InvalidRequest) as caught:
            app(server_kwargs=fields)
        assert "secret" not in str(caught.value)
    actor = {"runtime_env": {"env_vars": {"REMASK_API_KEY": "secret"}}}
    with pytest.raises(InvalidRequest, match="ingress_config") as caught:
        app(ingress_config={"num_replcas": 1, "ray_actor_options": actor})
    assert "secret" not in str(caught.value)


def test_a_deployment_fits_its_engines() -> None:
    from remask.options import EngineOptions
    from remask.ray.app import RemaskAppConfig, _deployment

    def options(**fields: Any) -> dict[str, Any]:
        config = RemaskAppConfig(model="tiny", **fields)
        return _deployment(config, EngineOptions.parse(model="tiny", **config.engine_kwargs))

    own = options(
        engine_kwargs={"max_num_seqs": 16}, deployment_config={"autoscaling_config": {"max_replicas": 4}}
    )
    assert own["max_ongoing_requests"] == 32
    assert own["autoscaling_config"] == {"max_replicas": 4, "target_ongoing_requests": 16}
    assert own["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 0}
    assert "placement_group_bundles" not in own
    own = options(engine_kwargs={"max_num_seqs": 16}, deployment_config={"num_replicas": "auto"})
    assert own["autoscaling_config"] == {"target_ongoing_requests": 16}
    own = options(engine_kwargs=ON_RAY, deployment_config={"ray_actor_options": {"num_cpus": 2}})
    assert own["placement_group_bundles"] == [{"CPU": 2}, *[{"CPU": 1.0}] * 3]
