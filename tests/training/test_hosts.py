# SPDX-License-Identifier: Apache-2.0
"""Law: processes meet where they are told to, or are told what is missing."""

import pytest

from adaptivejax.training import hosts
from adaptivejax.training.hosts import Peers

SLURM = dict.fromkeys(hosts.SLURM, "7")
ADDRESS = "10.0.0.2:8476"
FLAGS = Peers(ADDRESS, 2, 1)
NAMED = {
  "JAX_COORDINATOR_ADDRESS": ADDRESS,
  "JAX_NUM_PROCESSES": "2",
  "JAX_PROCESS_ID": "1",
}
DETECT = Peers()


@pytest.mark.parametrize(
  ("given", "environment", "on_tpu", "found"),
  [
    (Peers(), {}, False, None),
    (FLAGS, {}, False, FLAGS),
    (Peers(), NAMED, False, FLAGS),
    (Peers(process=0), NAMED, False, Peers(ADDRESS, 2, 0)),
    (Peers(processes=1), {}, True, None),
    (Peers(processes=1), SLURM | {"SLURM_NTASKS": "4"}, False, None),
    (Peers(), {}, True, DETECT),
    (Peers(), SLURM | {"SLURM_NTASKS": "4"}, False, DETECT),
    (Peers(), SLURM | {"SLURM_NTASKS": "1"}, False, None),
    (Peers(), {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, False, None),
    (Peers(coordinator=ADDRESS), {}, True, Peers(coordinator=ADDRESS)),
  ],
)
def test_who_meets_where(given, environment, on_tpu, found):
  assert hosts.peers(given, environment, on_tpu=on_tpu) == found


@pytest.mark.parametrize(
  ("given", "environment", "said"),
  [
    (
      Peers(ADDRESS),
      {},
      r"give --processes \(or JAX_NUM_PROCESSES\) and --pro",
    ),
    (Peers(ADDRESS, 2), {}, r"give --process \(or JAX_PROCESS_ID\) too"),
    (Peers(None, 2, 1), {}, "give --coordinator"),
    (Peers(ADDRESS, 2, 2), {}, "--process 2 must be one of 0 to 1"),
    (Peers(ADDRESS, 2, -1), {}, "--process -1 must be one of 0 to 1"),
    (Peers(ADDRESS, 1, 1), {}, "--process 1 must be one of 0 to 0"),
    (Peers(ADDRESS, 0, 0), {}, "--processes 0 must be at least 1"),
    (Peers("10.0.0.2", 2, 1), {}, "must be HOST:PORT"),
    (Peers(":8476", 2, 1), {}, "must be HOST:PORT"),
    (Peers("host:http", 2, 1), {}, "must be HOST:PORT"),
    (Peers(), NAMED | {"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID='one' must"),
  ],
)
def test_what_makes_no_meeting(given, environment, said):
  with pytest.raises(ValueError, match=said):
    hosts.peers(given, environment, on_tpu=False)


def test_too_late_is_said(monkeypatch):
  monkeypatch.setattr(hosts.jax.config, "update", lambda *_: None)
  hosts.jax.devices()
  with pytest.raises(ValueError, match="did not meet.*before"):
    hosts.start(FLAGS)


def test_alone_nothing_is_asked():
  hosts.start(Peers(processes=1))
  assert not hosts.jax.distributed.is_initialized()
