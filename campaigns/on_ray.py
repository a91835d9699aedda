"""docs/many-machines/ray_serve.py on this machine alone, with more than one replica: each line of
stdin is a thing to do, and each is answered by a line.  It runs in an environment that has Ray."""

import os
import signal
import sys

import ray
import ray_serve
from ray import serve
from ray.serve.config import AutoscalingConfig

FOLDER = sys.argv[1]
GROWS = AutoscalingConfig(
    min_replicas=1, max_replicas=2, target_ongoing_requests=2, upscale_delay_s=1
)
AUTO, TWO = {"autoscaling_config": GROWS}, {"autoscaling_config": None, "num_replicas": 2}


def deploy(**options):
    serve.delete("default")
    ray_serve.Replica = REPLICA.options(max_replicas_per_node=2, **options)
    given = {"model": f"{FOLDER}/export", "sessions": f"{FOLDER}/sessions", "ram": "1GiB"}
    serve.run(ray_serve.app(given))
    return count()


def count():
    (deployment,) = serve.status().applications["default"].deployments.values()
    return deployment.replica_states.get("RUNNING", 0)


def look(replica):
    """In a replica's process: how many answers are under way."""
    from slotmoe.offload.engine.engine import _ALL

    return sum(len(engine.batch.running) for engine in _ALL), os.getpid()


def kill():
    actors = ray.util.list_named_actors(all_namespaces=True)
    replicas = [ray.get_actor(**one) for one in actors if "Replica#" in one["name"]]
    found = ray.get([replica.__ray_call__.remote(look) for replica in replicas])
    (pid,) = (pid for running, pid in found if running)
    os.kill(pid, signal.SIGKILL)
    return pid


def end():
    serve.delete("default")
    return 0


ACTS = {"two": lambda: deploy(**TWO), "auto": lambda: deploy(**AUTO)}
ACTS |= {"count": count, "kill": kill, "end": end}
REPLICA = ray_serve.Replica
ray.init(num_cpus=4, include_dashboard=False, _node_ip_address="127.0.0.1")
serve.start(http_options={"host": "127.0.0.1", "port": 4124})
for line in sys.stdin:
    print(f"done {ACTS[line.strip()]()}", flush=True)
