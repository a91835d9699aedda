"""slotmoe on every node of a Ray cluster:

    serve run ray_serve:app model=/exports/lite sessions=/shared/sessions

Requests with the same X-Session-Id go to the same replica.  All replicas share the folder of
sessions, so another one goes on where one has ended.
"""

import os

from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
SEQUENCES, QUEUE = 4, 32  # answers of a replica that decode together, and that may wait


@serve.deployment(
    max_replicas_per_node=1,
    autoscaling_config=AutoscalingConfig(
        min_replicas=1, max_replicas=8, target_ongoing_requests=SEQUENCES
    ),
    max_ongoing_requests=SEQUENCES + QUEUE,
    request_router_config=RequestRouterConfig(request_router_class=ROUTER),
    graceful_shutdown_timeout_s=600,  # for running answers, where a replica is taken away
)
@serve.ingress()
class Replica:
    def __init__(self, model, sessions, keys, hosts, options):
        from slotmoe import Runtime
        from slotmoe.tools.serve import make_server

        self.runtime = Runtime.open(model, sequences=SEQUENCES, logits_rows=16, **options)
        self.runtime.keep_in(sessions, "100GiB", print)
        place = ["slotmoe"], SEQUENCES, QUEUE, keys, hosts
        self.server, self.service = make_server(self.runtime, *place)

    def __serve_build_asgi_app__(self):
        return self.server.config.app

    def check_health(self):
        if not self.service.engine.alive:
            raise RuntimeError("the model has failed")

    def __del__(self):
        self.runtime.close()


def app(given):
    """``model`` and ``sessions`` are paths on all nodes, ``hosts`` the names by which clients call,
    with commas; ``ram`` is a budget.  $SLOTMOE_API_KEY is the clients' key."""
    keys = [os.environ["SLOTMOE_API_KEY"]]
    hosts, options = given.get("hosts", "").split(","), {"ram": given.get("ram")}
    return Replica.bind(given["model"], given["sessions"], keys, hosts, options)
