"""The application: `serve run serve.app:build` on this machine, or infra/serve.yaml on a cluster.

Annotations stay real here: Ray Serve reads the builder's to make a ServeConfig of its arguments.
"""

import secrets

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig, RequestRouterConfig

from serve.api import Api
from serve.config import ServeConfig
from serve.diffusion import DiffusionEngine
from serve.encoder import ConceptEncoder
from serve.jobs import JobRunner
from serve.model import pinned

CALLS = 1000
"""Calls that a replica without an engine holds at once: each only waits for others."""
CALLS_BESIDE = 64
"""Calls that a diffusion replica holds beyond its pictures: whom the engine has no room for is told so at once."""
DRAIN_S = 60.0
"""How long a replica that is to go may finish what it holds."""
DRAIN_LOOK_S = 0.5
"""How often it looks whether it has."""
ONE_REPLICA = AutoscalingConfig(
    min_replicas=1, max_replicas=1, policy=AutoscalingPolicy(policy_function="serve.scaling:QueuedWorkPolicy")
)


def build(args: ServeConfig) -> Application:
    """Ingress → concept encoder → diffusion, and one replica for jobs; sized for one machine."""
    return application(args, ONE_REPLICA)


def application(config: ServeConfig, scaling: AutoscalingConfig) -> Application:
    """The same, with as many diffusion replicas as `scaling` says."""
    config = pinned(config)
    if config.url_secret is None:
        config = config.model_copy(update={"url_secret": secrets.token_hex(32)})
    encoder = serve.deployment(
        ConceptEncoder,
        max_ongoing_requests=32,
        max_queued_requests=256,
        graceful_shutdown_timeout_s=DRAIN_S,
        graceful_shutdown_wait_loop_s=DRAIN_LOOK_S,
        health_check_period_s=2.0,
        ray_actor_options={"num_cpus": 0.5},
    ).bind(config)
    diffusion = serve.deployment(
        DiffusionEngine,
        max_ongoing_requests=config.max_requests + CALLS_BESIDE,
        graceful_shutdown_timeout_s=DRAIN_S,
        graceful_shutdown_wait_loop_s=DRAIN_LOOK_S,
        health_check_period_s=2.0,
        ray_actor_options={"num_cpus": 1},
        request_router_config=RequestRouterConfig(request_router_class="serve.scaling:ConceptRouter"),
        autoscaling_config=scaling,
    ).bind(config)
    jobs = serve.deployment(
        JobRunner,
        num_replicas=1,
        max_ongoing_requests=CALLS,
        max_queued_requests=CALLS,
        # Killed at once: while it drained, the next one would run the same jobs.
        graceful_shutdown_timeout_s=0.0,
        health_check_period_s=2.0,
        ray_actor_options={"num_cpus": 0.1},
    ).bind(config, encoder, diffusion)
    ingress = serve.deployment(
        serve.ingress()(Api),
        name="Api",
        max_ongoing_requests=CALLS,
        max_queued_requests=CALLS,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=2),
        graceful_shutdown_timeout_s=DRAIN_S,
        graceful_shutdown_wait_loop_s=DRAIN_LOOK_S,
        ray_actor_options={"num_cpus": 0.1},
    )
    return ingress.bind(config, encoder, diffusion, jobs)
