"""`build_app`: the server as an application of Ray Serve.

An ingress has the endpoints of `remask serve`, the tokenizer and the state of every request. It sends the
requests to replicas of a second deployment, each with an engine of its own.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Mapping
from typing import Annotated, Any, cast

import msgspec
from msgspec import Meta
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatusOverview

from remask.async_llm import AsyncLLM
from remask.embedded import absolute_name
from remask.options import EngineOptions
from remask.outputs import RequestOutput
from remask.ray.remote import RemoteEngine
from remask.ray.replica import News, Replica, Work
from remask.scheduler.errors import InvalidRequest, did_you_mean
from remask.server.app import Served, make_app
from remask.server.gate import App
from remask.server.options import ENGINE_DEFAULTS, ServerOptions, check_defaults, with_key
from remask.workers.executors.ray_resources import default_gpus

ENGINE, INGRESS = "remask-engine", "remask-ingress"  # names of the deployments
NOT_SERVED = ("host", "port", "uds", "ssl_certfile", "ssl_keyfile", "root_path", "shutdown_timeout")
SHUTDOWN_SECONDS = 30.0
MAX_ONGOING = 4096  # requests of an ingress whose queue has no bound
HEALTH = {"health_check_period_s": 5.0, "health_check_timeout_s": 30.0}


class RemaskAppConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An application of Ray Serve.

    Attributes:
        model: As for `LLM`.
        engine_kwargs: Options of `EngineOptions`, with the ceilings of `remask serve` as defaults. Those of a
            queue hold for each replica of the ingress.
        server_kwargs: Options of `ServerOptions`: `api_key`, `served_model_name`, `allowed_origins` and
            `max_body_bytes`. Those of sockets are Serve's.
        defaults: Default parameters of requests.
        num_cpus: CPUs of a replica.
        num_gpus: GPUs of a replica; may be a fraction. None: 1 if the engine's device is "cuda", or if it is
            "auto" and the cluster has GPUs. 0 if the engine has workers on Ray, which have their own.
        deployment_config: Options of `serve.deployment` for the engines: `num_replicas`,
            `autoscaling_config`, `graceful_shutdown_timeout_s`, `ray_actor_options` and others.
        ingress_config: Options of `serve.deployment` for the ingress.
    """

    model: str
    engine_kwargs: dict[str, Any] = {}
    server_kwargs: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    num_cpus: Annotated[float, Meta(ge=0)] = 1
    num_gpus: Annotated[float, Meta(ge=0)] | None = None
    deployment_config: dict[str, Any] = {}
    ingress_config: dict[str, Any] = {}


@serve.ingress()
class Ingress:
    """The endpoints of `remask serve` in front of the engines of a deployment.

    Args:
        replicas: handle of the engines' deployment.
        engine: fields of `EngineOptions`.
        server: fields of `ServerOptions`.
        defaults: default parameters of requests.
    """

    def __init__(
        self,
        replicas: DeploymentHandle,
        engine: dict[str, Any],
        server: dict[str, Any],
        defaults: dict[str, Any],
    ) -> None:
        self._replicas = replicas.options(stream=True)
        options = EngineOptions.parse(**{"seed": secrets.randbits(53), **engine})
        self._llm = AsyncLLM.on(RemoteEngine(options, self._send, self._num_replicas))
        self._served = Served(self._llm, ServerOptions(**with_key(server)), defaults)

    def __serve_build_asgi_app__(self) -> App:
        return make_app(self._served)

    async def generate(self, *args: Any, **options: Any) -> AsyncGenerator[RequestOutput, None]:
        """`AsyncLLM.generate`, with its arguments, for deployment handles with `stream=True`."""
        async for output in self._llm.generate(*args, **options):
            yield output

    async def _send(self, work: Work) -> AsyncGenerator[News, None]:
        stream: Any = self._replicas.run.remote(work)  # a generator, by the handle's option
        try:
            async for news in stream:
                yield news
        finally:
            stream.cancel()

    def _num_replicas(self) -> int:
        """The number of engines that run, as Serve's controller knows it."""
        application: ApplicationStatusOverview | None = serve.status().applications.get(
            serve.get_replica_context().app_name
        )
        name = self._replicas.deployment_name
        deployment = None if application is None else application.deployments.get(name)
        states = {} if deployment is None else deployment.replica_states
        return sum(number for state, number in states.items() if state == "RUNNING")


def build_app(config: RemaskAppConfig | dict[str, Any]) -> Application:
    """An application for `serve.run`, or for `import_path: remask.ray:build_app` in a file of `serve run`,
    whose `args` are the fields of `RemaskAppConfig`.

    Raises:
        InvalidRequest: A field or an option is invalid, or a replica has more workers than its resources.
    """
    config = config if isinstance(config, RemaskAppConfig) else _parsed(config)
    server = _server_options(config.server_kwargs)
    for name in NOT_SERVED:
        if name in config.server_kwargs:
            problem = "is Serve's; use http_options, or options of a deployment"
            raise InvalidRequest(f"server_kwargs.{name}", config.server_kwargs[name], problem)
    server.check()
    check_defaults(config.defaults)
    if "model" in config.engine_kwargs:
        raise InvalidRequest("model", None, "is given by model and by engine_kwargs; keep one")
    given = {**ENGINE_DEFAULTS, **config.engine_kwargs, "model": absolute_name(config.model)}
    try:
        engine = EngineOptions.parse(**given)
    except TypeError as error:
        raise InvalidRequest("engine_kwargs", list(config.engine_kwargs), str(error)) from None
    own = _deployment(config, engine)
    replicas = _deployed(Replica, "deployment_config", own).bind(_without_ceilings(given))
    names = config.server_kwargs.get("served_model_name") or [config.model]
    before = {
        "name": INGRESS,
        # More than the queue takes, so that the ingress answers 429 and Serve does not wait.
        "max_ongoing_requests": 2 * (engine.max_queued_requests or MAX_ONGOING),
        "graceful_shutdown_timeout_s": own["graceful_shutdown_timeout_s"],
        **config.ingress_config,
    }
    before["ray_actor_options"] = {"num_cpus": 0, **before.get("ray_actor_options", {})}
    served = {**config.server_kwargs, "served_model_name": names}
    return _deployed(Ingress, "ingress_config", before).bind(replicas, given, served, config.defaults)


def _deployed(kind: type, place: str, options: Mapping[str, Any]) -> Deployment:
    """A deployment; `place` is what errors call its options."""
    try:
        return cast(Deployment, serve.deployment(kind, **options))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(place, list(options), str(error)) from None  # values may hold keys


def _parsed(given: Mapping[str, Any]) -> RemaskAppConfig:
    known = RemaskAppConfig.__struct_fields__
    for name in given:
        if name not in known:
            raise InvalidRequest(name, given[name], f"unknown field; {did_you_mean(name, known)}")
    if "model" not in given:
        raise InvalidRequest("model", None, "is missing; name a checkpoint directory, or 'tiny'")
    try:
        return msgspec.convert(dict(given), RemaskAppConfig)
    except msgspec.ValidationError as error:
        raise InvalidRequest("args", list(given), str(error)) from None


def _server_options(given: Mapping[str, Any]) -> ServerOptions:
    """Parsed options of the server. Errors show no values, which may be keys."""
    known = ServerOptions.__struct_fields__
    for name in given:
        if name not in known:
            problem = f"unknown option; {did_you_mean(name, known)}"
            raise InvalidRequest(f"server_kwargs.{name}", "a value", problem)
    try:
        return msgspec.convert(dict(given), ServerOptions)
    except msgspec.ValidationError as error:
        raise InvalidRequest("server_kwargs", list(given), str(error)) from None


def _without_ceilings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of an engine behind an ingress, which keeps the queue."""
    return {name: value for name, value in options.items() if not name.startswith("max_queued_")}


def _deployment(config: RemaskAppConfig, engine: EngineOptions) -> dict[str, Any]:
    """Options of the engines' deployment."""
    on_ray = engine.distributed_executor_backend == "ray"
    num_gpus = config.num_gpus
    if num_gpus is None:
        num_gpus = 0 if on_ray else default_gpus(engine.device)
    actor = {"num_cpus": config.num_cpus, "num_gpus": num_gpus}
    max_live = 2 * engine.max_num_seqs * engine.data_parallel_size
    options = {
        "name": ENGINE,
        "max_ongoing_requests": max_live,
        "graceful_shutdown_timeout_s": SHUTDOWN_SECONDS,
        **HEALTH,
        **config.deployment_config,
    }
    options["ray_actor_options"] = {**actor, **options.get("ray_actor_options", {})}
    scaling = options.get("autoscaling_config", {} if options.get("num_replicas") == "auto" else None)
    if isinstance(scaling, Mapping):
        options["autoscaling_config"] = {"target_ongoing_requests": max_live // 2, **scaling}
    if on_ray:
        options["placement_group_bundles"] = _bundles(options, engine)
    return options


def _bundles(options: Mapping[str, Any], engine: EngineOptions) -> list[dict[str, float]]:
    """Bundles of a replica with workers on Ray: the first is the replica's, each other one a worker's."""
    num_gpus = engine.num_gpus_per_worker
    worker = {
        "CPU": float(engine.num_cpus_per_worker),
        "GPU": float(default_gpus(engine.device) if num_gpus is None else num_gpus),
    }
    given = options.get("placement_group_bundles")
    if given is None:
        actor = options["ray_actor_options"]
        own = {"CPU": actor.get("num_cpus") or 0.001, "GPU": actor.get("num_gpus", 0)}  # none may be empty
        every = [own, *[worker] * engine.data_parallel_size]
        return [{name: number for name, number in bundle.items() if number} for bundle in every]
    room = sum(
        int(min(bundle.get(name, 0) // number for name, number in worker.items() if number))
        for bundle in given[1:]
    )
    if room < engine.data_parallel_size:
        problem = f"workers need {worker} each, and the bundles behind the replica's own have room for {room}"
        raise InvalidRequest("data_parallel_size", engine.data_parallel_size, problem)
    return list(given)
